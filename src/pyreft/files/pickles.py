"""Tensors from files of `torch.save` that anyone may have written: nothing is executed, or larger than its file.

A pickle of 3 kB can ask for any amount of memory: packed, with tensors that repeat a few numbers, or with no numbers.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..tuner.values import check_values

_SHARED = 4  # tied parameters of a model share what is stored


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, by their names, on the CPU.

    Whole numbers are let through, which the original stored beside the parameters; see `check_values`.

    Raises:
        ReftError: the file is missing, damaged, or larger in memory than on the disk; it holds more than tensors, or
            a number that is not finite.
    """
    if not file.is_file():
        raise ReftError(f"{file.parent}: {file.name} is missing; was the checkpoint copied completely?")
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as parts:  # of any other kind `torch.load` makes room before it reads
            packed = sum(part.file_size for part in parts.infolist()) > size
        data: Any = None if packed else torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # bytes that are not tensors fail in any way, and torch advises to execute them
        raise ReftError(
            f"{file}: the file is damaged, or holds more than tensors, which is never read. Copy or save it again."
        ) from None
    if packed:
        raise ReftError(f"{file}: its parts are compressed or overlap, as torch never writes them.")
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in data.items()
    ):
        raise ReftError(f"{file}: expected tensors by name, found something else.")
    for name, tensor in data.items():
        _check_plain(f"{file}: {name}", tensor)
        check_values(f"{file}: {name}", tensor, floats=False)
    if sum(tensor.nbytes for tensor in data.values()) > _SHARED * size:
        raise ReftError(f"{file}: the tensors are larger than the file, which holds their numbers many times over.")
    return data


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without numbers of its own, before it is copied."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_nested:
        raise ReftError(f"expected a plain tensor, found {tensor.layout} on {tensor.device}.", setting=name)
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ReftError(
            f"{list(tensor.shape)} are {tensor.nbytes:,} bytes, and {tensor.untyped_storage().nbytes():,} are "
            "stored for them: numbers that repeat, as of an expanded tensor. Make it contiguous() before it is saved.",
            setting=name,
        )
