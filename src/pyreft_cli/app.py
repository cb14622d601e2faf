"""The `pyreft` command and how it ends: one clear line on an error that the user can mend."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperOption

from pyreft.errors import ReftError, is_disk_full
from pyreft.files.text import repeated
from pyreft_cli import ask, chat, data, demo, eval, info, inspect, plan, serve, train, tune
from pyreft_cli.console import speak_plainly
from pyreft_cli.settings import at_home

INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__base__  # the class of all errors in what was typed has no public name

app = typer.Typer(
    name="pyreft",
    help="Representation finetuning (ReFT): adapt a frozen language model by small learned edits of its hidden states.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    """Print the version and end, if it is asked for."""
    if asked:
        typer.echo(version("pyreft"))
        raise typer.Exit


@app.callback()
def program(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The options that stand before a command; what the app is for, it says above."""


class Command(TyperCommand):
    """A command that refuses names and texts given twice, which may have been meant as several, unless it takes those.

    Of a number, a switch, the output and the model the last one counts, as in other commands.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was typed."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        rest = super().parse_args(ctx, args)
        params = [param for param in given if isinstance(param, TyperOption) and not param.multiple]
        texts = [
            param.opts[0]
            for param in params
            if param.name not in ("output", "model") and isinstance(ctx.params.get(str(param.name)), str | Path)
        ]
        if (name := repeated(texts)) is not None and not ctx.resilient_parsing:
            raise typer.BadParameter("it stands there twice; give it once.", ctx, param_hint=name)
        ctx.params.update(at_home(ctx.params))
        return rest


app.command(cls=Command)(demo.demo)
app.command(cls=Command)(train.train)
app.command(cls=Command)(tune.tune)
app.command(cls=Command)(plan.plan)
app.command(cls=Command)(data.data)
app.command("eval", cls=Command)(eval.evaluate)
app.command(cls=Command)(ask.generate)
app.command(cls=Command)(chat.chat)
app.command(cls=Command)(info.info)
app.command(cls=Command)(inspect.inspect)
app.command(cls=Command, context_settings={"allow_extra_args": True})(serve.serve)


def main() -> None:
    """Run the command line; errors that a user can mend end it with status 2 and a line on what to do."""
    speak_plainly()
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="pyreft", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted.", INTERRUPTED)
    except Exception as error:
        if is_disk_full(error):
            fail("the disk is full. What was complete before is as it was; make room and run the command again.")
        if isinstance(error, _UsageError):
            fail(usage(error), error.exit_code)
        if isinstance(error, ReftError):
            fail(as_typed(error, sys.argv[1]))
        if not isinstance(error, OSError) or error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}.")
    if status == INTERRUPTED:
        fail("interrupted.", status)
    sys.exit(status)


def usage(error: Any) -> str:
    """What is wrong with the words of a command."""
    help_of = error.ctx.command_path if error.ctx else "pyreft"
    text = re.sub(r"^Invalid value for '?([^':]+)'?: ", r"\1: ", error.format_message())
    return f"{text}\nTry '{help_of} --help'."


# settings of the library that an option of another name fills
_OPTIONS = {"low_rank_dimension": "rank", "layer": "layers", "memory": "reach_memory"}


def as_typed(error: ReftError, command: str) -> str:
    """The message of an error in a command, with its settings as the options that the command has for them."""
    group: Any = typer.main.get_command(app)
    params = group.commands[command].params
    options = {param.name: opt for param in params for opt in param.opts if opt.startswith("--")}
    names = options | {setting: options[name] for setting, name in _OPTIONS.items() if name in options}
    if error.where not in (None, command):  # it stands in a file, under its own name
        names.pop(error.setting, None)
    return error.told(names)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error and end."""
    print(f"pyreft: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what is left cannot be written, as the end of the program would find once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
