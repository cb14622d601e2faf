"""Processes that train together need the same data, of which each then draws its share."""

from collections.abc import Sized
from typing import Any

import xxhash
from accelerate.utils import gather_object
from torch import Tensor

from ..errors import ReftError

_SAMPLE = 16  # rows that are compared


def check_same_data(dataset: Any) -> None:
    """Compare the data sets of all processes by their lengths and some of their rows.

    Raises:
        ReftError: in every process, if they differ.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return  # a stream, which may be parted already
    count = len(dataset)
    digest = xxhash.xxh3_128()
    for number in range(0, count, max(1, count // _SAMPLE)):
        if (row := _plain(dataset[number])) == _plain(dataset[number]):  # nothing is drawn at random
            digest.update(row.encode())
    found: list[tuple[int, str]] = gather_object([(count, digest.hexdigest())])
    if len(set(found)) > 1:
        sizes = ", ".join(f"{rows:,} rows in process {process}" for process, (rows, _) in enumerate(found))
        raise ReftError(
            f"train_dataset: the processes have different data: {sizes}, not all the same rows. Give each the whole "
            "data set in the same order; the trainer parts it among them."
        )


def _plain(row: Any) -> str:
    """The numbers and texts of a row; what else there is may look different in each process."""
    columns = row.items() if isinstance(row, dict) else ()
    values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns}
    return repr(
        [(name, value) for name, value in sorted(values.items()) if isinstance(value, list | int | float | str)]
    )
