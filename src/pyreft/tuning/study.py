"""The study of a tuning: which points were tried, with what result, and which one comes next. Optuna keeps it.

It lies in `study.db` in the output, so that whatever stops a tuning loses nothing but the trainings under way. A point
is proposed from what is known and the seed alone: a study that was stopped goes on as if nothing had been.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ReftError
from .records import DIVERGED, DONE, PRUNED, REFUSED, RUNNING, STOPPED, Record
from .space import Point, Space

FILE = "study.db"
_NAME = "tune"
_PRIME = 1_000_003
_RANDOM = 8  # trainings before what is known guides the next ones
_UNPRUNED = 4  # trainings before any is stopped for its held-out loss
_BEST = 5  # trainings that what decides is told by
_REFUSED = 500  # points in turn that have too many parameters


def check_optuna() -> None:
    """Refuse to go on without Optuna.

    Raises:
        ReftError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ReftError('Tuning needs Optuna, which is not installed: pip install "pyreft[tune]".') from None


class Study:
    """The study in a directory, made if there is none.

    Args:
        directory: where `study.db` is.
        space: what may be tried.
        seed: of what is drawn.
        warmup: up to this step, no training is stopped for its held-out loss.
        several: whether several processes try at once.

    Raises:
        ReftError: the file is damaged, or no study.
    """

    def __init__(self, directory: Path, space: Space, seed: int, *, warmup: int, several: bool = False) -> None:
        import optuna

        self._optuna, self._space, self._seed, self._several = optuna, space, seed, several
        path = directory / FILE
        _check_database(path)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED, n_warmup_steps=warmup)
        with _quiet(optuna):
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self._study: Any = optuna.create_study(
                study_name=_NAME, storage=storage, load_if_exists=True, pruner=pruner, direction="minimize"
            )
        uniform, log = optuna.distributions.CategoricalDistribution, {"log": True}
        whole = all(isinstance(number, int) for number in space.epochs)
        numbers: Any = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
        self._distributions = {
            "edit": uniform(list(space.edits)),
            "layers": uniform(list(space.layers)),
            "positions": uniform(space.positions),
            "dropout": uniform(space.dropout),
            "rank": optuna.distributions.FloatDistribution(0, 1),
            "lr": optuna.distributions.FloatDistribution(*space.lr, **log),
            "epochs": numbers(*space.epochs, **log),
        }

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Begin it, or go on with it: what was under way when it was stopped is tried again.

        Args:
            fingerprint: what must be the same when a study goes on, by name.

        Raises:
            ReftError: it is a study of something else.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        known = self._study.user_attrs.get("fingerprint")
        if known is None:
            for point in self._space.starts:
                self._study.enqueue_trial(self._space.to_params(point), skip_if_exists=True)  # where a kill cut it off
            self._study.set_user_attr("fingerprint", fingerprint)
            return
        for name, now in fingerprint.items():
            if known.get(name) != now:
                raise ReftError(
                    f"the study was begun with other {_WHAT[name]}{_difference(known.get(name), now)}; go on with "
                    "the same, or choose another `output`.",
                    setting="resume",
                    also=["output"],
                )
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == self._optuna.trial.TrialState.RUNNING:
                self.put_back(trial)

    def put(self, point: Point) -> None:
        """Have a point tried before others are proposed."""
        self._study.enqueue_trial(self._space.to_params(point))

    def ask(self, most: int | None) -> tuple[Any, Point] | None:
        """Return a trial and its point; none if as many as asked for are done or under way, or nothing is left to try.

        Args:
            most: how many trainings the study is to have.
        """
        states = self._optuna.trial.TrialState
        for _ in range(_REFUSED):
            known = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING))
            if most is not None and sum(trial.user_attrs.get("state") != REFUSED for trial in known) >= most:
                return None
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=(self._seed * _PRIME + len(known)) % 2**32,
                n_startup_trials=_RANDOM,
                multivariate=True,
                constant_liar=self._several,
            )
            trial = self._study.ask(self._distributions)
            point = self._space.to_point(trial.params)
            if point is not None:
                return trial, point
            trial.set_user_attr("state", REFUSED)
            self._study.tell(trial, state=states.PRUNED)
        return None

    def note(self, trial: Any, record: Record) -> None:
        """Keep what is known of a trial."""
        trial.set_user_attr("record", record.to_dict())

    def tell(self, trial: Any, record: Record) -> None:
        """Keep the result of a trial that is over."""
        self.note(trial, record)
        states = self._optuna.trial.TrialState
        done = record.state == DONE
        self._study.tell(trial, record.value if done else None, state=states.COMPLETE if done else states.PRUNED)

    def report(self, trial: Any, step: int, loss: float) -> bool:
        """Keep a held-out loss on the way; whether the training is to be stopped for it."""
        trial.report(loss, step)
        return bool(trial.should_prune())

    def put_back(self, trial: Any) -> None:
        """Have the point of a trial that could not end tried again, the next time."""
        self._study.enqueue_trial(trial.params)
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def records(self) -> list[Record]:
        """What is known of each trial that had a training, by number; those that could not end are `stopped`."""
        found = []
        states = self._optuna.trial.TrialState
        over = {states.COMPLETE: DONE, states.PRUNED: PRUNED, states.RUNNING: RUNNING, states.FAIL: STOPPED}
        for trial in self._study.get_trials(deepcopy=False):
            if "record" not in trial.user_attrs:
                continue
            record = Record.from_dict(trial.user_attrs["record"])
            steps = trial.intermediate_values
            if record.state != DIVERGED:
                record.state = over[trial.state]
            record.curve = sorted(steps.items())
            found.append(record)
        return found

    def importances(self) -> dict[str, float]:
        """How much each setting decides whether a training is among the best, by PED-ANOVA, in shares of 1.

        The best are a quarter of those that are done, five at least; empty with fewer than twice that, of which nothing
        can be said.
        """
        done = [trial for trial in self._study.get_trials(deepcopy=False) if trial.value is not None]
        if len({trial.value for trial in done}) < 2 * _BEST:
            return {}
        share = max(0.25, _BEST / len(done))
        evaluator = self._optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
        with _quiet(self._optuna):
            found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}


_WHAT = {
    "data": "data",
    "validation": "held-out data",
    "model": "base model (or another release of torch or transformers)",
    "settings": "settings",
}


def _difference(before: Any, now: Any) -> str:
    """In a few words, where it can be told."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return ""
    if "rows" in before and "rows" in now:
        return f" ({before['rows']:,} rows, now {now['rows']:,})"
    name = next(name for name in before | now if before.get(name) != now.get(name))
    return f" ({name} = {before.get(name)!r}, now {now.get(name)!r})"


def _check_database(path: Path) -> None:
    if not path.exists():
        return
    try:
        with suppress(sqlite3.OperationalError):  # one that another process writes now
            connection = sqlite3.connect(path, timeout=60)
            try:
                connection.execute("PRAGMA schema_version").fetchall()
                problem = connection.execute("PRAGMA quick_check").fetchone()[0]
            finally:
                connection.close()
            if problem != "ok":
                raise sqlite3.DatabaseError(problem)
    except sqlite3.DatabaseError as error:
        raise ReftError(f"{path}: the study is damaged ({error}); choose another output.") from None


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Let Optuna tell of nothing but problems."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
