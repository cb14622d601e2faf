"""The snippets of a Markdown file, and how they are run: Python code, and the commands of pyreft."""

import re
import shlex

from typer.testing import CliRunner

from pyreft_cli.app import app


def blocks(path, language):
    """The code blocks of a language, in their order."""
    return [code for name, code in all_blocks(path) if name == language]


def all_blocks(path):
    """Every code block with its language, in their order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def shell_commands(code):
    """The commands of pyreft among the lines of a shell snippet, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("pyreft ")]


def run_snippets(path):
    """Run the Python blocks and the commands of pyreft in their order, in the working directory.

    Each Python block has the names of those before; returns these names.
    """
    names = {}
    for number, (language, code) in enumerate(all_blocks(path)):
        if language == "python":
            exec(compile(code, f"{path.name}, snippet {number}", "exec"), names)
        for command in shell_commands(code) if language in ("bash", "sh", "console") else ():
            done = CliRunner().invoke(app, shlex.split(command)[1:], input="What is a cat?\n/quit\n")
            assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
    return names
