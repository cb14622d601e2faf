"""The `pyreft` command and how it ends: one clear line on an error that the user can mend."""

import errno
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyreft_cli import ask, data, demo, eval, info, inspect, plan, serve, train, tune

if TYPE_CHECKING:
    from pyreft.errors import ReftError

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
def program(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The options that stand before a command; what the app is for, it says above."""


app.command()(demo.demo)
app.command()(train.train)
app.command()(tune.tune)
app.command()(plan.plan)
app.command()(data.data)
app.command("eval")(eval.evaluate)
app.command()(ask.generate)
app.command()(ask.chat)
app.command()(info.info)
app.command()(inspect.inspect)
app.command(context_settings={"allow_extra_args": True})(serve.serve)


def main() -> None:
    """Run the command line; errors that a user can mend end it with status 2 and a line on what to do."""
    try:
        app()
    except KeyboardInterrupt:
        fail("interrupted.", 130)
    except ValueError as error:
        from pyreft.errors import ReftError

        if not isinstance(error, ReftError):
            raise
        fail(as_typed(error, sys.argv[1]))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail("the disk is full. What was complete before is as it was; make room and run the command again.")
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}.")


# settings of the library that an option of another name fills
_OPTIONS = {"low_rank_dimension": "rank", "layer": "layers", "memory": "reach_memory"}


def as_typed(error: "ReftError", command: str) -> str:
    """The message of an error in a command, with its settings as the options that the command has for them."""
    group: Any = typer.main.get_command(app)
    params = group.commands[command].params
    options = {param.name: opt for param in params for opt in param.opts if opt.startswith("--")}
    names = options | {setting: options[name] for setting, name in _OPTIONS.items() if name in options}
    if error.where not in (None, command):  # it stands in a file, under its own name
        names.pop(error.setting, None)
    return error.told(names)


def fail(message: str, status: int = 2) -> None:
    """Print an error and end."""
    print(f"pyreft: {message}", file=sys.stderr)
    sys.exit(status)
