"""What a tuning leaves in its output: the best adapter, its settings as YAML, all trials, and the frontier drawn."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..files.together import save_together
from ..jobs.settings import TrainingJob
from .picture import write_frontier
from .records import Record, best_of, frontier

BEST, SETTINGS, TRIALS, PICTURE = "best", "best.yaml", "trials.json", "frontier.svg"
ADAPTERS = "trials"


@dataclass(frozen=True)
class Tuned:
    """The result of a tuning.

    Args:
        output: the directory.
        score: what it was scored by, `loss` or `exact`.
        trials: every training, by number.
        importances: of each setting, how much it decides whether a training is among the best, see
            `study.Study.importances`; empty with fewer than ten that are done.

    Attributes:
        best: the training whose adapter is in `best`.
        default: the one of the settings that nobody has tuned.
        adapter: the directory of the best adapter.
        settings: the file of its settings, for `pyreft train --config`.
        picture: of the frontier; none if matplotlib is not installed.
    """

    output: Path
    score: str
    trials: tuple[Record, ...]
    importances: dict[str, float]

    @property
    def best(self) -> Record:
        found = best_of(self.trials)
        assert found is not None
        return found

    @property
    def default(self) -> Record | None:
        return best_of(record for record in self.trials if record.default)

    @property
    def adapter(self) -> Path:
        return self.output / BEST

    @property
    def settings(self) -> Path:
        return self.output / SETTINGS

    @property
    def picture(self) -> Path | None:
        path = self.output / PICTURE
        return path if path.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `trials.json` holds it."""
        costs: tuple[Any, Any] = ("parameters", "seconds")
        return {
            "score": self.score,
            "best": self.best.number,
            "default": None if self.default is None else self.default.number,
            "frontier": {cost: [record.number for record in frontier(self.trials, cost)] for cost in costs},
            "importances": self.importances,
            "trials": [record.to_dict() for record in self.trials],
        }


def write_outcome(
    output: Path, job: TrainingJob, score: str, records: Sequence[Record], importances: dict[str, float]
) -> Tuned | None:
    """Write what is known so far; nothing if no training is done.

    Args:
        job: with the settings that were not searched.
    """
    best = best_of(records)
    if best is None:
        return None
    tuned = Tuned(output, score, tuple(records), importances)
    here = output / ADAPTERS / str(best.number)

    def copy(staged: str) -> None:
        for path in here.iterdir():
            if path.is_file():
                shutil.copyfile(path, Path(staged) / path.name)

    def write(staged: str) -> None:
        told = json.dumps(tuned.to_dict(), indent=1, ensure_ascii=False)
        (Path(staged) / TRIALS).write_text(told + "\n", encoding="utf-8")
        (Path(staged) / SETTINGS).write_text(as_yaml(job, best), encoding="utf-8")
        write_frontier(tuned.trials, score, Path(staged) / PICTURE)

    save_together(output / BEST, copy)
    save_together(output, write)
    return tuned


def as_yaml(job: TrainingJob, best: Record) -> str:
    """The settings with which `pyreft train --config` trains the same adapter."""
    whole = replace(job, **best.settings)
    chosen = {"seed", "batch_size", *best.settings}
    values = {
        f.name: value
        for f in fields(whole)
        if f.name != "output" and ((value := getattr(whole, f.name)) != f.default or f.name in chosen)
    }
    for name in ("data", "validation", "model"):
        if values.get(name) and Path(values[name]).exists():
            values[name] = str(Path(values[name]).absolute())
    head = f"# {best.name}\n# pyreft train --config {SETTINGS} --output DIRECTORY trains the adapter of {BEST} again\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
