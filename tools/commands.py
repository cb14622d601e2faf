"""Write docs/commands.md, the reference of the commands, from what they say of themselves: python tools/commands.py."""

import re
from pathlib import Path
from typing import Any

import typer

from pyreft_cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
_HEAD = """# Commands

What `pyreft COMMAND --help` says, written by `python tools/commands.py`. `python -m pyreft` is the same program. \
Errors end a command with status 2 and a line that begins with `pyreft:`, an interrupt with 130.

`pyreft --install-completion` teaches bash, zsh, fish or PowerShell to complete commands and options with the tab \
key; `pyreft --show-completion` prints what it would install.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    return "\n".join([_HEAD, *(section(name, command) for name, command in group.commands.items())])


def section(name: str, command: Any) -> str:
    """What a command does, its arguments and its options."""
    context = typer.Context(command, info_name=f"pyreft {name}")
    words = " ".join(command.collect_usage_pieces(context)[1:])
    records = [param.get_help_record(context) for param in command.get_params(context) if param.name != "help"]
    # the arguments have none of their own in the help of a command without rich
    rows = [(what, _line(told)) for what, told in filter(None, records)]
    text = "\n\n".join(map(_line, (command.help or "").split("\n\n")))
    table = "\n".join(["| | |", "|---|---|", *(f"| `{what}` | {told} |" for what, told in rows)])
    return f"## pyreft {name}\n\n{text}\n\n```text\npyreft {name} [OPTIONS] {words}".rstrip() + f"\n```\n\n{table}\n"


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
