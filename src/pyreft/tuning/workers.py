"""The trainings of a study, one after the other in a process, or in several processes at once."""

import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ReftError
from ..jobs.output import CHECKPOINTS
from ..training.trainer import DivergedError
from .asked import Asked
from .attempt import Attempt, Shared, Watching
from .outcome import ADAPTERS
from .records import DIVERGED, DONE, PRUNED, Record, value_of
from .space import Point, find_space
from .study import Study

Progress = Callable[[Sequence[Record], float | None], None]
_POLL = 0.5  # seconds


class _PrunedError(Exception):
    """The held-out loss is worse than that of most trainings."""


class _TimeUpError(Exception):
    """No time is left."""


@dataclass
class Teller:
    """Tells how a study goes.

    Args:
        asked, study: which.
        progress: is called with the trainings so far and the seconds that are left, if that can be said.
    """

    asked: Asked
    study: Study
    progress: Progress
    _begun: float = field(default_factory=time.time)
    _before: int | None = None  # trainings that were over when this run began

    def __call__(self) -> None:
        records = self.study.records()
        over = sum(record.state in (DONE, PRUNED, DIVERGED) for record in records)
        self._before = over if self._before is None else self._before
        now, asked = time.time(), self.asked
        left = [] if asked.until is None else [max(0.0, asked.until - now)]
        if asked.trials is not None and over > self._before:
            left.append((now - self._begun) / (over - self._before) * max(0, asked.trials - over))
        self.progress(records, min(left, default=None))


class Workplace:
    """All that the trainings of a study need in one process.

    Args:
        asked: the tuning.

    Raises:
        ReftError: whatever would stop it.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked, self.shared = asked, Shared(asked.job)
        rows, job = self.shared.first.rows, asked.job
        self.space = find_space(self.shared.model, job, rows, given=asked.kept, most=asked.most)
        each = math.ceil(len(rows) / (job.batch_size * job.gradient_accumulation))
        self._shortest, self._longest = (math.ceil(each * number) for number in self.space.epochs)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when the study goes on."""
        job = self.asked.job
        kept = {name: getattr(job, name) for name in self.asked.kept} | job.settled
        settings = kept | {"score": self.asked.score, **self.space.to_dict()}
        return self.shared.fingerprint() | {"settings": settings}

    def open_study(self) -> Study:
        """The study in the output, which is there."""
        several, warmup = self.asked.jobs > 1, self._shortest // 2
        return Study(self.asked.output, self.space, self.asked.job.seed, warmup=warmup, several=several)

    def work(self, study: Study, tell: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
        """Train until the time or the trainings that were asked for are used up; one is begun in any case.

        Args:
            study: that of the output.
            tell: is called whenever something is new.
            check: is called after each step.
        """
        while (found := study.ask(self.asked.trials)) is not None:
            self._try(study, *found, tell, check)
            tell()
            if not self._is_time():
                return

    def _is_time(self) -> bool:
        return self.asked.until is None or time.time() < self.asked.until

    def _try(self, study: Study, trial: Any, point: Point, tell: Callable[[], None], check: Callable[[], None]) -> None:
        settings, default = self.space.settings(point), point == self.space.starts[0]
        record = Record(trial.number, settings, point, default, self.space.count(point))
        place = self.asked.output / ADAPTERS / str(trial.number)

        def each() -> None:
            check()
            if not (default or self._is_time()):
                raise _TimeUpError

        def measured(step: int, loss: float) -> None:
            _check_finite(loss)
            bad = study.report(trial, step, loss)
            tell()
            if bad and not default:
                raise _PrunedError

        job = replace(self.asked.job, output=str(place), overwrite=True, **settings)
        attempt = Attempt(job, self.shared, Watching(marks(self._shortest, self._longest), measured, each))
        record.steps = math.ceil(attempt.steps())
        study.note(trial, record)
        tell()
        try:
            self._train(attempt, record)
        except (_PrunedError, DivergedError, _TimeUpError) as reason:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(reason, _TimeUpError):
                study.put_back(trial)
                return
            record.state = PRUNED if isinstance(reason, _PrunedError) else DIVERGED
        else:
            shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        study.tell(trial, record)

    def _train(self, attempt: Attempt, record: Record) -> None:
        """Train, save and score."""
        figures = attempt.train()
        record.parameters = figures["parameters"]
        record.seconds = figures["seconds"] - attempt.watching.seconds
        record.loss = attempt.loss()
        _check_finite(record.loss)
        record.exact = attempt.exact() if self.asked.score == "exact" else None
        record.value = value_of(record.loss, record.exact, len(attempt.validation))
        record.state = DONE


def marks(shortest: int, longest: int) -> list[int]:
    """After which steps the held-out loss is measured: from a quarter of the shortest training on, each mark √2 times
    the one before, so that a training is compared with others at the same step."""
    found, number = [], 0
    while (step := round(max(1.0, shortest / 4) * 2 ** (number / 2))) < longest:
        found.append(step)
        number += 1
    return list(dict.fromkeys(found))


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"The training diverges: the held-out loss is {loss}.")


# -- several processes -------------------------------------------------------------------------------------------------


def work_together(asked: Asked, tell: Callable[[], None]) -> None:
    """Let processes train, each with its share of the threads.

    Raises:
        ReftError: what one of them met.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    errors = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // asked.jobs)
    arguments = (asked, threads, os.getpid(), errors)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(asked.jobs)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL)
            tell()
            for process in processes:
                if process.exitcode:
                    if not errors.empty():
                        raise errors.get()
                    raise ReftError(f"A process of the tuning ended with status {process.exitcode}.")
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(asked: Asked, threads: int, parent: int, errors: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends its processes
    torch.set_num_threads(threads)

    def check() -> None:
        if os.getppid() != parent:  # it was killed
            os._exit(1)

    try:
        place = Workplace(asked)
        place.work(place.open_study(), lambda: None, check)
    except BaseException as error:
        errors.put(error if isinstance(error, ReftError) else RuntimeError(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
