"""Data sets by name from the Hugging Face hub, as the rows that the suites read; where a suite has its own there.

The commonsense and arithmetic files of the paper are not on the hub under a name of their authors, but for GSM8K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ReftError
from .layouts import Row


@dataclass(frozen=True)
class Source:
    """A split of a data set.

    Args:
        path, name: what `datasets.load_dataset` takes.
        splits: from our names to those of the data set.
        row: from a row of it to the fields that the suite reads.
        files: a file of the data set, where it is not read as a whole.
    """

    path: str
    name: str | None
    splits: dict[str, str]
    row: Callable[[dict[str, Any]], dict[str, Any]]
    files: str | None = None


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": row["question"], "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


def _preferred(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": row["prompt"], "input": "", "output": row["chosen"][-1]["content"]}


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", {"test": "test"}, _gsm8k),
    # the answers that were preferred; the paper trains on UltraFeedback, of which this is a cleaned part
    "instruct": Source("argilla/ultrafeedback-binarized-preferences-cleaned", None, {"train": "train"}, _preferred),
    "alpaca_eval": Source(
        "json", None, {"test": "train"}, dict, "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
    ),
}


def load(task: str, split: str, file: str, source: str) -> list[Row]:
    """Return the rows of a split.

    Args:
        task: a key of `SOURCES`, or `glue/` and the name of a task of GLUE, whose columns stay as they are.
        file, source: what to put into a directory instead, and where to get it, for messages.

    Raises:
        ReftError: a task that is not on the hub, or a hub that does not answer.
    """
    if task.startswith("glue/"):
        found = Source("nyu-mll/glue", task.removeprefix("glue/"), {split: split}, dict)
    elif task in SOURCES and split in SOURCES[task].splits:
        found = SOURCES[task]
    else:
        raise ReftError(
            f"{task} is not on the hub by a name; give a directory with {file}, from {source}.", setting="data_dir"
        )
    import datasets

    files = {"data_files": found.files} if found.files else {}
    try:
        rows = datasets.load_dataset(found.path, found.name, split=found.splits[split], **files)
    except Exception as error:  # many kinds: of the network, the hub and the file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftError(
            f"{found.files or found.path} could not be loaded from the hub ({first}). Without a network, "
            f"give a directory with {file}, from {source}.",
            setting="data_dir",
        ) from None
    return [Row(f"{found.path}, row {number}", found.row(row)) for number, row in enumerate(rows, 1)]
