"""Processes that train together need the same data, of which each then draws its share."""

from collections.abc import Mapping, Sized
from typing import Any

import xxhash
from accelerate.utils import gather_object
from torch import Tensor

from ..errors import ReftError

_MOST = 10_000  # rows that are compared, spread over a longer data set


def check_same_data(name: str, dataset: Any) -> None:
    """Compare the data sets of all processes by their lengths and their rows.

    Args:
        name: of the argument that it is.
        dataset: a data set, or several by name.

    Raises:
        ReftError: in every process, if they differ.
    """
    if isinstance(dataset, Mapping):
        for key, value in dataset.items():
            check_same_data(f"{name}[{key!r}]", value)
        return
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return  # a stream, which may be parted already
    count = len(dataset)
    digest = xxhash.xxh3_128()
    for number in range(0, count, max(1, -(-count // _MOST))):
        if (row := _plain(dataset[number])) == _plain(dataset[number]):  # nothing is drawn at random
            digest.update(row.encode())
    found: list[tuple[int, str]] = gather_object([(count, digest.hexdigest())])
    if len(set(found)) > 1:
        sizes = ", ".join(f"{rows:,} rows in process {process}" for process, (rows, _) in enumerate(found))
        raise ReftError(
            f"the processes have different data: {sizes}, not all the same rows. Give each the whole "
            "data set in the same order; the trainer parts it among them.",
            setting=name,
        )


def _plain(row: Any) -> str:
    """The numbers and texts of a row; what else there is may look different in each process."""
    columns = row.items() if isinstance(row, dict) else ()
    values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns}
    return repr(
        [(name, value) for name, value in sorted(values.items()) if isinstance(value, list | int | float | str)]
    )
