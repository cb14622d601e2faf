"""Every snippet of the README runs; the commands it names exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from snippets import blocks, run_python

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(README)


def test_ci_runs_the_commands_of_the_readme():
    commands = "\n".join(blocks(README, "bash"))
    script = (ROOT / ".ci" / "run").read_text()
    for line in ('pip install -c constraints.txt -e ".[dev]"', "pytest -n 2"):
        assert line in commands
    assert 'pip install --quiet -c constraints.txt -e ".[dev]"' in script
    assert "pytest -n 2" in script


def shell_commands():
    lines = "\n".join(blocks(README, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("pyreft ")]


def test_shell_snippets_run_in_order(tmp_path):
    assert len(shell_commands()) >= 4
    for command in shell_commands():
        done = subprocess.run(
            f'"{sys.executable}" -m pyreft_cli {command.removeprefix("pyreft ")}',
            shell=True,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            input="What is a cat?\n/quit\n",
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
