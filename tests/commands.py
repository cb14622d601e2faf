"""The commands of pyreft as a test runs them, in the process of the test."""

from typer.testing import CliRunner

from pyreft_cli.app import app


def run(*arguments, text=None, status=0):
    """Run a command in this process; errors of the library come out as they would in `main`."""
    result = CliRunner().invoke(app, list(map(str, arguments)), input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result
