"""Recipes: a table of the paper as a file of settings, from which training jobs are made.

A recipe has `suite`; `settings`, which all methods share; `decoding`, how answers are generated; and `methods`, the
settings of each. Under a method, `base` and `large` hold what differs by the size of the encoder and by the task.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ReftError, did_you_mean
from ..files.record import FILE as RECORD
from ..files.record import read_record
from ..files.text import read_yaml
from ..loading import read_model_config
from ..tasks.glue import TASKS, find_task
from ..tasks.suites import GLUE, check_suite
from .limits import METHODS
from .settings import TrainingJob, check_decoding

SHIPPED = Path(__file__).parents[1] / "recipes"
LARGE_LAYERS = 18  # an encoder of so many layers takes the settings of RoBERTa large
_SIZES = ("base", "large")
_KEYS = ("suite", "settings", "decoding", "methods")
# what a job gets from the command or from elsewhere in the recipe, never from a recipe's settings
_NOT_SETTINGS = ("data", "output", "suite", "method", "task", "validation", "validation_split", "format", "decoding")


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe and check its keys.

    Args:
        name: a YAML file, or the name of a shipped recipe.

    Raises:
        ReftError: no such recipe, not YAML, or a key that is not known, with the nearest one.
    """
    path = SHIPPED / f"{name}.yaml" if str(name) in shipped() else Path(name)
    if not path.is_file():
        raise ReftError(
            f"expected a YAML file or one of {', '.join(shipped())}, got {str(name)!r}."
            f"{did_you_mean(Path(name).stem, shipped())}",
            setting="recipe",
        )
    recipe = read_yaml(path)
    _check(recipe, str(name))
    return recipe


def recipe_jobs(name: str | Path, given: dict[str, Any]) -> list[TrainingJob]:
    """Return the jobs of a recipe: one, or one for each task of GLUE if none is named.

    Args:
        name: see `read_recipe`.
        given: settings that win over the recipe's; `method` is LoReFT if it is not among them.

    Raises:
        ReftError: a recipe or a setting that cannot be, or a method or a task that the recipe does not have.
    """
    recipe = read_recipe(name)
    suite, method = recipe["suite"], given.get("method") or "loreft"
    settings = recipe["settings"] | {"decoding": recipe["decoding"] or None}
    if method not in recipe["methods"]:
        known = ", ".join(recipe["methods"])
        raise ReftError(
            f"{name} has {known}, got {method!r}.{did_you_mean(method, recipe['methods'])}", setting="method"
        )
    for setting in ("data", "intervention", "format"):
        if given.get(setting):
            raise ReftError("a recipe decides it by its suite and method; leave it out.", setting=setting)
    output = given.get("output") or f"{suite}-{method}"
    common = {"suite": suite, "method": method, "output": output}
    if suite != GLUE:
        if given.get("task"):
            raise ReftError(f"one adapter is trained for all of {suite}; name tasks in `pyreft eval`.", setting="task")
        return [_job(name, settings, recipe["methods"][method], given, common)]
    config = read_model_config(given.get("model"))
    size = "large" if getattr(config, "num_hidden_layers", 0) >= LARGE_LAYERS else "base"
    block = dict(recipe["methods"][method])
    sized = {key: block.pop(key, {}) for key in _SIZES}[size]
    tasks = {find_task(given["task"]).name: given.get("output")} if given.get("task") else dict.fromkeys(TASKS)
    return [
        _job(
            name,
            settings,
            block | sized.get(task, {}),
            given,
            common | {"task": task, "output": place or f"{output}/{task}"},
        )
        for task, place in tasks.items()
    ]


def decoding_of(suite: str) -> dict[str, Any]:
    """How the shipped recipe of a suite generates answers, as arguments of `generate`."""
    return dict(read_recipe(suite)["decoding"])


def read_decoding(directory: str | os.PathLike, suite: str) -> dict[str, Any]:
    """Return how an adapter generates answers to a suite: as its own recipe says, else as the suite's shipped one.

    Raises:
        ReftError: the record is damaged.
    """
    record = read_record(directory)
    if record.get("suite") == suite and record.get("decoding"):
        return check_decoding(record["decoding"], str(Path(directory) / RECORD))
    return decoding_of(suite)


def _job(name: Any, shared: dict, method: dict, given: dict[str, Any], common: dict[str, Any]) -> TrainingJob:
    return TrainingJob.from_settings({**shared, **method, **given, **common}, str(name))


def _check(recipe: Any, where: str) -> None:
    if not isinstance(recipe, dict):
        raise ReftError(f"a recipe should hold the keys {', '.join(_KEYS)}.", where=where)
    _known(recipe, _KEYS, where)
    suite = check_suite(recipe.get("suite"), where)
    settings = [field.name for field in fields(TrainingJob) if field.name not in _NOT_SETTINGS]
    recipe["settings"] = recipe.get("settings") or {}
    _known(recipe["settings"], settings, f"{where}: settings")
    recipe["decoding"] = check_decoding(recipe.get("decoding", {}), where)
    _known(recipe.get("methods", {}), METHODS, f"{where}: methods")
    if not recipe.get("methods"):
        raise ReftError(f"expected at least one of {', '.join(METHODS)}.", setting="methods", where=where)
    for method, block in recipe["methods"].items():
        sizes = _SIZES if suite == GLUE else ()
        _known(block, (*settings, *sizes), f"{where}: methods: {method}")
        for size in sizes:
            _known(block.get(size, {}), TASKS, f"{where}: methods: {method}: {size}")
            for task, changes in block.get(size, {}).items():
                _known(changes, settings, f"{where}: methods: {method}: {size}: {task}")


def _known(block: Any, known: Any, where: str) -> None:
    if not isinstance(block, dict):
        raise ReftError(f"expected 'name: value' lines, got {block!r}.", where=where)
    for key in block:
        if key not in known:
            raise ReftError(f"there is no key {key!r}.{did_you_mean(key, known)}", where=where)
