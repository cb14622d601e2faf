"""Files that belong together are replaced together: a save is one rename, whatever is killed and when.

A save fills a hidden directory inside its target, `.saving-<random>`, and renames it to `.saved`: with that, and not
before, the save is made. Then its files move to their places. If that is cut off, the next to read or to save there
puts the rest in place. Whoever does so holds the directory (`flock`, which the end of a process ends): two savers come
one after the other, and what a dead one left is removed.

Programs that know nothing of this, PEFT and transformers, read the places alone. For them a config that changes is
removed first and put back last, so that they find the old adapter, the new one or none.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft.utils import CONFIG_NAME

from ..errors import ReftError

try:
    import fcntl
except ImportError:  # Windows: savers of one directory are not kept apart there
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".saving-"
_SAVED = ".saved"


def save_together(directory: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Let `write` fill a new directory, and replace the files of the target with its files, all or none.

    Other files of the target stay, but for those that `leave_out` names. If `write` fails, the target is as it was.

    Args:
        directory: the target; made if it is not there.
        write: is given the new directory.

    Raises:
        ReftError: the target is a file.
    """
    target = Path(directory)
    if target.is_file():
        raise ReftError(f"{target}: expected a directory to save in, this is a file.")
    made = not target.exists()
    with _held(target, make=True) as alone:
        _put_in_place(target)
        if alone:
            for left in target.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target))
        try:
            write(str(staged))
            _flush(staged)
            os.replace(staged, target / _SAVED)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if made:
                with suppress(OSError):
                    target.rmdir()
            raise
        _put_in_place(target)


def leave_out(directory: str | os.PathLike, *names: str) -> None:
    """Have a save remove files of an earlier one that it does not bring; to be called by its `write`."""
    for name in names:
        (Path(directory) / name).touch()  # an empty file stands for none


@contextmanager
def reading(directory: str | os.PathLike) -> Iterator[Path]:
    """Read several files of a directory as one save left them; a save waits until this is over.

    Raises:
        ReftError: a save was cut off there, and its files cannot be put in place.
    """
    target = Path(directory)
    while target.is_dir():
        _settle(target)
        with _held(target, shared=True):
            if not (target / _SAVED).is_dir():
                yield target
                return
    yield target


def _settle(target: Path) -> None:
    """Put in place what a save left that was cut off, or wait for one that is under way."""
    if not (target / _SAVED).is_dir():
        return
    try:
        with _held(target):
            _put_in_place(target)
    except OSError as error:
        raise ReftError(
            f"{target}: a save was cut off here when its files were complete, in {_SAVED}, and they cannot be put in "
            f"place ({error.strerror}: {error.filename}). Whoever may write there can do so by loading the adapter."
        ) from None


def _put_in_place(target: Path) -> None:
    """Move the files of a save that is made to where they belong; it may be done in part already."""
    saved = target / _SAVED
    if not saved.is_dir():
        return
    names = [path.relative_to(saved) for path in saved.rglob("*") if not path.is_dir()]
    # the configs last of all, the directory's own after those of further adapters below it
    names.sort(key=lambda name: (name.name == CONFIG_NAME, -len(name.parts), name))
    for name in names:
        there = target / name
        if name.name == CONFIG_NAME and there.exists() and there.read_bytes() != (saved / name).read_bytes():
            there.unlink(missing_ok=True)
    for name in names:
        if (saved / name).stat().st_size:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(saved / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
            (saved / name).unlink()
    shutil.rmtree(saved)


def _flush(directory: Path) -> None:
    """See that the files are on the disk before a name says so."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file)


@contextmanager
def _held(directory: Path, *, shared: bool = False, make: bool = False) -> Iterator[bool]:
    """Hold a directory, alone or with other readers, once it is free; yields whether this system can."""
    place = _lock(directory, shared, make)
    try:
        yield place is not None
    finally:
        if place is not None:
            fcntl.flock(place, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too
            os.close(place)


def _lock(directory: Path, shared: bool, make: bool) -> int | None:
    while True:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        try:
            place = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # a saver that failed has taken it back
            if make:
                continue
            return None
        except OSError:  # a directory that is not to be listed
            return None
        try:
            fcntl.flock(place, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(place), os.stat(directory)):
                return place
        except FileNotFoundError:
            pass
        except (OSError, AttributeError):  # a file system without locks, or a system without `fcntl`
            os.close(place)
            return None
        os.close(place)
