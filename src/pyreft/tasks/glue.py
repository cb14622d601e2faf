"""GLUE, the suite whose answers are classes: its tasks, their columns and metrics, and how validation is split in two.

As in the ReFT paper (arXiv 2404.03592, tables 4 and 13): each task is trained alone. The best epoch is chosen on one
part of the validation set, and the other part is scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ReftError, did_you_mean
from . import hub
from .layouts import Row, find, read_tsv

SOURCE = "https://gluebenchmark.com/tasks"
CHOOSING = 1000  # how many examples choose the epoch where the validation set is large; else half of it
LARGE = 5000


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Args:
        name: as the hub writes it.
        title, folder: as the table and the published files write it.
        columns: of the one or two sentences and the label, in the files: names, or numbers without a first line.
        hub_columns: of the sentences, on the hub.
        labels: the classes in the order of their numbers; none where the label is a number.
        metrics: the one of the paper's table, and further ones.
        ragged: the published file has lines that were cut; they are left out, as `datasets` does.
    """

    name: str
    title: str
    folder: str
    columns: tuple[str | int, ...]
    hub_columns: tuple[str, ...]
    labels: tuple[str, ...] | None = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    ragged: bool = False

    @property
    def outputs(self) -> int:
        """How many outputs the classifier has."""
        return len(self.labels or (0,))


@dataclass(frozen=True)
class Pair:
    """One or two sentences and the number of their class, or the number that they were given."""

    where: str
    sentences: tuple[str, ...]
    label: float


_ENTAILED = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task(
            "mnli",
            "MNLI",
            "MNLI",
            ("sentence1", "sentence2", "gold_label"),
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
        ),
        Task("sst2", "SST-2", "SST-2", ("sentence", "label"), ("sentence",)),
        Task(
            "mrpc",
            "MRPC",
            "MRPC",
            ("#1 String", "#2 String", "Quality"),
            ("sentence1", "sentence2"),
            metrics=("accuracy", "f1"),
        ),
        Task("cola", "CoLA", "CoLA", (3, 1), ("sentence",), metrics=("matthews",)),
        Task("qnli", "QNLI", "QNLI", ("question", "sentence", "label"), ("question", "sentence"), _ENTAILED),
        Task(
            "qqp",
            "QQP",
            "QQP",
            ("question1", "question2", "is_duplicate"),
            ("question1", "question2"),
            metrics=("accuracy", "f1"),
            ragged=True,
        ),
        Task("rte", "RTE", "RTE", ("sentence1", "sentence2", "label"), ("sentence1", "sentence2"), _ENTAILED),
        Task(
            "stsb",
            "STS-B",
            "STS-B",
            ("sentence1", "sentence2", "score"),
            ("sentence1", "sentence2"),
            None,
            ("pearson", "spearman"),
        ),
    )
}


def find_task(name: str) -> Task:
    """Return a task by its name, in any spelling of its case.

    Raises:
        ReftError: there is no such task.
    """
    plain = name.lower().replace("-", "")
    if plain not in TASKS:
        raise ReftError(f"GLUE has {', '.join(TASKS)}, got {name!r}.{did_you_mean(plain, TASKS)}", setting="task")
    return TASKS[plain]


def read(task: Task, split: str, directory: str | Path | None, limit: int | None = None) -> list[Pair]:
    """Return a task's examples, the first `limit` of them; without a directory from the hub.

    Args:
        split: `"train"` or `"validation"`, which is `dev.tsv` in the published files; of MNLI the matched one.

    Raises:
        ReftError: data that is missing or of another layout, with its place.
    """
    matched = "_matched" if task.name == "mnli" and split == "validation" else ""
    file = f"{task.folder}/{'train' if split == 'train' else 'dev'}{matched}.tsv"
    if directory is None:
        rows = hub.load(f"glue/{task.name}", split + matched, file, SOURCE)[:limit]
        return [Pair(r.where, tuple(r.fields[c] for c in task.hub_columns), float(r.fields["label"])) for r in rows]
    rows = read_tsv(find(directory, (file, f"glue_data/{file}"), SOURCE), task.columns, ragged=task.ragged)[:limit]
    *sentences, label = map(str, task.columns)
    return [Pair(row.where, tuple(row.fields[c] for c in sentences), _label(task, row, label)) for row in rows]


def split_validation(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Part the validation set in two by a seed, as the original's script does: to choose the epoch on, and to score.

    Raises:
        ReftError: fewer than two examples.
    """
    count = CHOOSING if len(pairs) > LARGE else len(pairs) // 2
    if not count:
        raise ReftError(f"{len(pairs)} example cannot be parted in two; expected 2 or more.", setting="validation")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    scored = len(pairs) - count
    return [pairs[at] for at in order[scored:]], [pairs[at] for at in order[:scored]]


def _label(task: Task, row: Row, column: str) -> float:
    text = row.fields[column].strip()
    if task.labels is not None:
        if text not in task.labels:
            raise ReftError(f"{row.where}: the column {column!r} should be {', '.join(task.labels)}, got {text!r}.")
        return task.labels.index(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ReftError(f"{row.where}: the column {column!r} should be a number, got {text!r}.")
    return number
