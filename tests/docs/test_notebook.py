"""The notebook of examples/: a valid one, whose cells run in their order and do what they say."""

import json
from pathlib import Path

import pytest

from pyreft import pocket

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first-adapter.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "it is kept without what it printed"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert all(map(pocket.emojis_only, names["after"]))
    assert not any(map(pocket.emojis_only, names["before"]))
    assert (tmp_path / "notebook-adapter" / "adapter_model.safetensors").stat().st_size < 25_000
