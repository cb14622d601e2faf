"""Files that belong together are replaced together: a save is one rename, whatever is killed and when.

A save fills a hidden directory inside its target, `.saving-<random>`, and renames it to `.saved`: with that, and not
before, the save is made. Then its files move to their places. If that is cut off, the next to read or to save there
puts the rest in place. Whoever moves or reads files holds the directory (`flock`, which the end of a process ends),
and who fills one holds a file in it: the next saver removes those that nobody holds.

Programs that know nothing of this, PEFT and transformers, read the places alone. For them a config that changes is
removed first and put back last, so that they find the old adapter, the new one or none.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from peft.utils import CONFIG_NAME

from ..errors import ReftError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".saving-"
_SAVED = ".saved"
_HELD = ".held"


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
    with ExitStack() as mine:
        with held(target, make=True):
            _put_in_place(target)
            _remove_dead(target)
            staged = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target))
            leave_out(staged, _HELD)
            mine.enter_context(held(staged / _HELD))
        try:
            write(str(staged))
            _flush(staged)
            with held(target):
                _put_in_place(target)
                os.replace(staged, target / _SAVED)
                _put_in_place(target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if made:
                with held(target), suppress(OSError):
                    target.rmdir()
            raise


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
        with held(target, shared=True):
            if not (target / _SAVED).is_dir():
                yield target
                return
    yield target


def _settle(target: Path) -> None:
    """Put in place what a save left that was cut off, or wait for one that is under way."""
    if not (target / _SAVED).is_dir():
        return
    try:
        with held(target):
            _put_in_place(target)
    except OSError as error:
        raise ReftError(
            f"{target}: a save was cut off here when its files were complete, in {_SAVED}, and they cannot be put in "
            f"place ({error.strerror}: {error.filename}). Whoever may write there can do so by loading the adapter."
        ) from None


def _remove_dead(target: Path) -> None:
    """Remove what savers left that were killed; one that lives holds a file in its directory."""
    for left in target.glob(f"{_UNFINISHED}*"):
        with held(left / _HELD, wait=False) as dead:
            if dead or not (left / _HELD).exists():
                shutil.rmtree(left, ignore_errors=True)


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
    for empty in sorted(saved.rglob("*"), reverse=True):
        empty.rmdir()
    saved.rmdir()


def _flush(directory: Path) -> None:
    """See that the files are on the disk before a name says so."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file)


@contextmanager
def held(path: Path, *, shared: bool = False, wait: bool = True, make: bool = False) -> Iterator[bool]:
    """Hold a file or directory, alone or with other readers; yields whether that is so, which not every system can."""
    if make:
        path.mkdir(parents=True, exist_ok=True)
    place = None if fcntl is None else _lock(path, shared, wait, make)
    try:
        yield place is not None
    finally:
        if place is not None:
            fcntl.flock(place, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too
            os.close(place)


def _lock(path: Path, shared: bool, wait: bool, make: bool) -> int | None:
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        place = None
        try:
            place = os.open(path, os.O_RDONLY)
            fcntl.flock(place, how)
            if os.path.samestat(os.fstat(place), os.stat(path)):
                return place
            gone = True
        except OSError as error:  # gone, held by another, not to be listed, or on a file system without locks
            gone = isinstance(error, FileNotFoundError)
        if place is not None:
            os.close(place)
        if not (gone and make):
            return None
        path.mkdir(parents=True, exist_ok=True)  # a saver that failed took back what it had made
