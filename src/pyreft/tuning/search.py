"""`tune`: trainings of many settings within a time, each scored on held-out examples, and the best one kept."""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import ReftError
from ..files.together import held
from .asked import LOCK, Asked, Score, check_output, read_asked
from .outcome import ADAPTERS, Tuned, write_outcome
from .records import STOPPED, Record
from .study import check_optuna
from .workers import Progress, Teller, Workplace, work_together


def tune(
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    model: str | None = None,
    minutes: float | None = None,
    trials: int | None = None,
    parameters: int | str | None = None,
    score: Score = "loss",
    validation: str | None = None,
    validation_split: float | None = None,
    jobs: int = 1,
    seed: int = 42,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Find settings of an adapter for some data, and train it.

    The first training is that of the default settings, so the best one is never worse on the held-out examples.

    Args:
        data: a file of examples, as `pyreft train` reads it.
        output: a new or empty directory, for the study, the best adapter and what was found.
        model: the base model, see `pyreft.loading.load_base`.
        minutes: how long it takes, but for the first training; 10 if neither this nor `trials` is given.
        trials: how many trainings there are, those of an earlier run included.
        parameters: how many an adapter may have, a number or text such as `"20k"`.
        score: what is compared on the held-out examples: the `loss`, or how many answers are `exact`, of equal ones
            the loss.
        validation: a file of the held-out examples; or `validation_split`, their share of the data, 0.2 if neither is
            given.
        jobs: how many processes train at once; the points they try then depend on which of them is first.
        seed: of the split, of each training, and of what is tried.
        resume: go on with the study in `output`.
        settings: further settings of `pyreft.jobs.settings.TrainingJob`. Of those that would be searched
            (intervention, component, layers, positions, dropout, rank, lr, epochs), the ones that are given stay.
        progress: called with the trainings so far and the seconds that are left, if that can be said.

    Returns:
        The trainings, and where the best adapter is.

    Raises:
        ReftError: whatever would stop it, before the first training.
    """
    check_optuna()
    given = {**(settings or {}), "data": str(data), "model": model, "seed": seed}
    given |= {"validation": validation, "validation_split": validation_split}
    limits: dict[str, Any] = {"minutes": minutes, "trials": trials, "parameters": parameters}
    asked = read_asked(given, Path(output), score=score, jobs=jobs, **limits)
    check_output(asked.output, resume)
    return _search(asked, progress or (lambda records, left: None))


def _search(asked: Asked, progress: Progress) -> Tuned:
    place = Workplace(asked)
    asked.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = asked.output / LOCK
        lock.touch()
        if not stack.enter_context(held(lock, wait=False)) and os.name == "posix":
            raise ReftError(f"{asked.output} is being tuned by another process; wait for it, or choose another output.")
        study = place.open_study()
        study.begin(place.fingerprint())
        _remove_stopped(asked.output, study.records())
        tell = Teller(asked, study, progress)
        try:
            if asked.jobs == 1:
                place.work(study, tell)
            else:
                del place  # each process has its own
                work_together(asked, tell)
        finally:
            tuned = write_outcome(asked.output, asked.job, asked.score, study.records(), study.importances())
    if tuned is None:
        raise ReftError("Every training diverged, so there is no adapter. Fix a smaller `lr`.", also=["lr"])
    return tuned


def _remove_stopped(output: Path, records: Iterable[Record]) -> None:
    """Remove what trainings left that could not end."""
    for record in records:
        if record.state == STOPPED:
            shutil.rmtree(output / ADAPTERS / str(record.number), ignore_errors=True)
