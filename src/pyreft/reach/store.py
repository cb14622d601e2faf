"""What was computed of the base model, held for later steps: tensors under keys, within a budget, on disk if asked.

Nothing is known of what the tensors are. An entry is what was put in, bit for bit, or it is not there.
"""

import os
import re
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import psutil
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ReftError, is_disk_full

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNFINISHED = ".part"
_OURS = "pyreft-"  # how the names of unfinished files begin
_ABANDONED = 600  # seconds after which no running process writes such a file any more


def read_budget(budget: int | str | None) -> int:
    """Return a budget in bytes, from a number or text such as `"4GB"`; by default half of the free memory.

    Processes of one machine that train together share it.

    Raises:
        ReftError: anything else, or less than nothing.
    """
    if budget is None:
        return free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", str(budget).strip().upper())
    if not match:
        raise ReftError(
            f"expected a number of bytes from 0 on, or text such as '4GB', got {budget!r}.", setting="memory"
        )
    return int(float(match[1]) * _UNITS[match[2] or ""])


def free_memory() -> int:
    """How many bytes of the machine's memory, or of the container's, are free."""
    free = psutil.virtual_memory().available
    try:  # the limit of a container, which the machine's figures do not show
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


@dataclass
class _Entry:
    tensors: list[Tensor]
    epoch: int

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Store:
    """Lists of tensors under keys of bytes.

    What is full takes nothing more: in epochs over the same rows, to keep some of them saves more than to keep the
    latest. An entry that a whole epoch did not ask for makes room.

    Args:
        budget: how many bytes may be held in memory.
        directory: where to put what does not fit, memory-mapped when it is read; it stays there, for a later run on
            the same base model.

    Raises:
        ReftError: a directory that cannot be written or read.
    """

    def __init__(self, budget: int, directory: str | os.PathLike | None = None) -> None:
        self.budget = budget
        self.held = self.missed = self.on_disk = 0
        self.full = False
        self._entries: dict[bytes, _Entry] = {}
        self._epoch = 0
        self._directory = None if directory is None else _prepare(Path(directory))
        self._writes = directory is not None

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> list[Tensor] | None:
        """Return what was put in under a key, or nothing."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.epoch = self._epoch
        tensors = entry.tensors if entry is not None else self._read(key)
        self.missed += tensors is None
        return tensors

    def put(self, key: bytes, tensors: list[Tensor]) -> None:
        """Hold tensors, on the CPU, if they fit."""
        if key in self._entries:
            return
        entry = _Entry([tensor.detach().cpu() for tensor in tensors], self._epoch)
        if self.held + entry.size > self.budget:
            self._make_room()
        if self.held + entry.size <= self.budget:
            self._entries[key] = entry
            self.held += entry.size
        elif self._directory is not None and self._writes:
            self._write(self._directory, key, entry.tensors)
        else:
            self.full = True

    def clear(self) -> None:
        """Let go of everything in memory; files stay, under keys that name the base model."""
        self._entries.clear()
        self.held = 0

    def new_epoch(self) -> None:
        """Tell that another pass over the rows begins."""
        self._epoch += 1

    def _make_room(self) -> None:
        for key in [key for key, entry in self._entries.items() if entry.epoch < self._epoch - 1]:
            self.held -= self._entries.pop(key).size

    # -- files ----------------------------------------------------------------------------------------------------

    def _path(self, directory: Path, key: bytes) -> Path:
        return directory / f"{key.hex()}.safetensors"

    def _write(self, directory: Path, key: bytes, tensors: list[Tensor]) -> None:
        """Write a file that is complete or absent; a full disk ends the writing, not the training."""
        path = self._path(directory, key)
        if path.exists():
            return
        named = {str(number): tensor.contiguous() for number, tensor in enumerate(tensors)}
        unfinished = None
        try:
            with NamedTemporaryFile(dir=directory, prefix=_OURS, suffix=_UNFINISHED, delete=False) as file:
                unfinished = Path(file.name)
            save_file(named, unfinished, {"key": key.hex(), "checksum": _checksum(tensors)})
            os.replace(unfinished, path)
            self.on_disk += 1
        except (OSError, SafetensorError) as error:
            self.full, self._writes = True, False
            what = "the disk is full" if is_disk_full(error) else error
            warnings.warn(f"{directory}: nothing more is kept there: {what}. It is computed again.", stacklevel=2)
        finally:
            if unfinished is not None:
                unfinished.unlink(missing_ok=True)

    def _read(self, key: bytes) -> list[Tensor] | None:
        """Read a file and prove it; a damaged one is removed."""
        if self._directory is None:
            return None
        path = self._path(self._directory, key)
        try:
            if not path.exists():
                return None
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(str(number)) for number in range(len(file.keys()))]
                known = file.metadata() or {}
            if known.get("key") == key.hex() and known.get("checksum") == _checksum(tensors):
                return tensors
            problem = "its checksum does not fit"
        except (OSError, SafetensorError) as error:
            problem = str(error)
        warnings.warn(f"{path}: damaged ({problem}); it is removed and computed again.", stacklevel=2)
        with suppress(OSError):  # of another user
            path.unlink(missing_ok=True)
        return None


def _checksum(tensors: list[Tensor]) -> str:
    """Of the values, types and shapes."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def _prepare(directory: Path) -> Path:
    """Make a directory, see that it can be written and read, and remove what an interrupted run left half done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob(f"{_OURS}*{_UNFINISHED}"):
            with suppress(FileNotFoundError):  # another process removes it, too
                if time.time() - unfinished.stat().st_mtime > _ABANDONED:
                    unfinished.unlink()
        with NamedTemporaryFile(dir=directory, prefix=_OURS, suffix=_UNFINISHED) as file:
            file.write(b"x")
        next(directory.iterdir(), None)
    except OSError as error:
        raise ReftError(
            f"{directory}: expected a directory that can be written, for what does not fit into memory "
            f"({os.strerror(error.errno or 0)}). Name another one, or none."
        ) from None
    return directory
