"""A tuning as it is asked for, checked: what can be wrong with it is told before anything is loaded."""

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ReftError, check_type, did_you_mean
from ..jobs.settings import TrainingJob, check_settings
from .study import FILE

Score = Literal["loss", "exact"]
LOCK = ".tuning"
SEARCHED = ("intervention", "component", "layers", "positions", "dropout", "rank", "lr", "epochs")
_MINUTES = 10.0
_SPLIT = 0.2
_UNITS = {"": 1, "k": 10**3, "m": 10**6}
# settings of a training that a tuning decides itself, or that lead elsewhere
_ELSEWHERE = (
    *("output", "suite", "task", "data_dir", "decoding", "method", "alpha", "target_modules", "share_weights"),
    *("save_steps", "report_to", "resume", "overwrite", "reach_directory", "best", "early_stopping", "push_to_hub"),
)


@dataclass(frozen=True)
class Asked:
    """A tuning as it was asked for.

    Args:
        job: the data, the model, the seed, and the settings that nobody has tuned.
        output, score, jobs: see `tune`.
        kept: the settings that are not searched.
        most: how many parameters an adapter may have.
        trials: how many trainings the study is to have.
        until: when the last one begins, by `time.time`; none for no end.
    """

    job: TrainingJob
    output: Path
    score: Score
    jobs: int
    kept: tuple[str, ...]
    most: int | None
    trials: int | None
    until: float | None


def read_asked(
    settings: Mapping[str, Any],
    output: Path,
    *,
    minutes: float | None,
    trials: int | None,
    parameters: int | str | None,
    score: str,
    jobs: int,
) -> Asked:
    """Check a tuning.

    Args:
        settings: of the trainings; none for what is not given.
        output, minutes, trials, parameters, score, jobs: see `search.tune`.

    Raises:
        ReftError: what cannot be.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    known = [f.name for f in fields(TrainingJob) if f.name not in _ELSEWHERE]
    for name in given:
        if name not in known:
            raise ReftError(f"a tuning has no such setting.{did_you_mean(name, known)}", setting=name)
    job = TrainingJob.from_settings(given, "tune", needed=("data",))
    if not job.validation and "validation_split" not in given:
        job.validation_split = _SPLIT
    check_settings(job)
    if not (job.validation or job.validation_split):
        raise ReftError(
            "expected a share above 0, or a file of examples to score on as `validation`, got neither.",
            setting="validation_split",
            also=["validation"],
        )
    for name, value, kind in (("minutes", minutes, float), ("trials", trials, int), ("jobs", jobs, int)):
        if value is not None:
            check_type(name, value, kind)
    if minutes is not None and not 0 < minutes < math.inf:
        raise ReftError(f"expected a number above 0, got {minutes}.", setting="minutes")
    for name, number in (("trials", trials), ("jobs", jobs)):
        if number is not None and number < 1:
            raise ReftError(f"expected 1 or more, got {number}.", setting=name)
    if score not in get_args(Score):
        raise ReftError(
            f"expected {' or '.join(get_args(Score))}, got {score!r}.{did_you_mean(score, get_args(Score))}",
            setting="score",
        )
    most = None if parameters is None else read_count(parameters)
    if minutes is None and trials is None:
        minutes = _MINUTES
    until = None if minutes is None else time.time() + 60 * minutes
    kept = tuple(name for name in SEARCHED if name in given)
    return Asked(job, output, score, jobs, kept, most, trials, until)  # type: ignore[arg-type]


def read_count(value: int | str) -> int:
    """A number of parameters, from a number or text such as `"20k"` or `"1.5M"`.

    Raises:
        ReftError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:[._]?\d+)*)\s*([km]?)", str(value).strip().lower())
    if isinstance(value, bool) or not match or not (count := int(float(match[1]) * _UNITS[match[2]])):
        raise ReftError(f"expected a number above 0 such as 5000, 20k or 1.5M, got {value!r}.", setting="parameters")
    return count


def check_output(output: Path, resume: bool) -> None:
    """Refuse a directory that holds something else, or a study that is not to be gone on with.

    Raises:
        ReftError: what stands in the way.
    """
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.exists() and not output.is_dir():
        raise ReftError(f"expected a directory, {output} is a file.", setting="output")
    if FILE not in there:
        if others := sorted(there - {LOCK}):
            raise ReftError(
                f"{output} holds something else ({', '.join(others[:3])}); choose a new or empty directory.",
                setting="output",
            )
        if resume:
            raise ReftError(
                f"there is no study in {output} to go on with; leave it out to begin one.", setting="resume"
            )
    elif not resume:
        raise ReftError(
            f"{output} already holds a study; choose another directory, or pass `resume` to go on with it.",
            setting="output",
            also=["resume"],
        )
    try:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise ReftError(f"{output}: nothing can be written there ({error.strerror}).", setting="output") from None
