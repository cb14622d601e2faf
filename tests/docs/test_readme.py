"""Every snippet of the README runs; the commands it names exist."""

from pathlib import Path

import pytest

from snippets import blocks, run_snippets, shell_commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_snippets(README)
    assert sum(len(shell_commands(code)) for code in blocks(README, "bash")) >= 4


def test_ci_runs_the_commands_of_the_readme():
    commands = "\n".join(blocks(README, "bash"))
    script = (ROOT / ".ci" / "run").read_text()
    for line in ('pip install -c constraints.txt -e ".[dev]"', "pytest -n 2"):
        assert line in commands
    assert 'pip install --quiet -c constraints.txt -e ".[dev]"' in script
    assert "pytest -n 2" in script
