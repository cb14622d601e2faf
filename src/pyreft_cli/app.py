"""The `pyreft` command and how it ends: one clear line on an error that the user can mend."""

import errno
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from pyreft_cli import ask, demo, eval, info, inspect, plan, serve, study, train

app = typer.Typer(
    name="pyreft",
    help="Representation finetuning (ReFT): adapt a frozen language model by small learned edits of its hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    """Print the version and end, if it is asked for."""
    if asked:
        typer.echo(version("pyreft"))
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The options that stand before a command; what the app is for, it says above."""


app.command()(demo.demo)
app.command()(train.train)
app.command()(plan.plan)
app.command("eval")(eval.evaluate)
app.command()(ask.generate)
app.command()(ask.chat)
app.command()(info.info)
app.command()(inspect.inspect)
app.command(context_settings={"allow_extra_args": True})(serve.serve)
app.command()(study.study)


def main() -> None:
    """Run the command line; errors that a user can mend end it with status 2 and a line on what to do."""
    try:
        app()
    except KeyboardInterrupt:
        fail("interrupted.", 130)
    except ValueError as error:
        if type(error).__name__ != "ReftError":
            raise
        commands: Any = typer.main.get_command(app)
        fail(as_typed(str(error), getattr(commands.commands.get(sys.argv[1]), "params", ())))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail("the disk is full. What was complete before is as it was; make room and run the command again.")
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}.")


_OTHER_NAMES = {"low_rank_dimension": "rank", "layer": "layers"}  # of a config's fields that an option fills


def as_typed(message: str, params: Iterable[Any]) -> str:
    """Write the setting that a message begins with, and those in backquotes, as the options of a command."""
    options = {param.name: name for param in params for name in param.opts if name.startswith("--")}

    def option(match: re.Match[str]) -> str:
        name = match[match.lastindex or 0]
        return options.get(_OTHER_NAMES.get(name, name), match[0])

    first = r"(?:^|(?<=^train: )|(?<=^plan: ))(\w+)(?=: )"
    return re.sub(rf"{first}|`(\w+)`|(?<=the setting )'(\w+)'", option, message)


def fail(message: str, status: int = 2) -> None:
    """Print an error and end."""
    print(f"pyreft: {message}", file=sys.stderr)
    sys.exit(status)
