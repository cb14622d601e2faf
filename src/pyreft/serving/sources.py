"""Where adapters lie: folders of a directory, or at a URL that fsspec knows, such as a bucket's.

A folder says what changes when its files are replaced, and gives both files as they are at one moment. Knows nothing
of what is in them.
"""

import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import ReftError
from ..files.adapter import is_adapter
from ..files.together import reading
from .served import CONFIG, WEIGHTS

_log = logging.getLogger(__name__)
NAME = re.compile(r"[\w][\w.@+:=-]*(?:/[\w][\w.@+:=-]*)?")  # one slash at most, as in the names of a hub
_SETTLED = 0.1  # seconds: both files are replaced one after the other
_TRIES = 20
Stamp = tuple[object, ...]


class Folder(Protocol):
    """An adapter's two files, wherever they are; as a text, where that is."""

    def exists(self) -> bool:
        """Whether it is still there."""
        ...

    def stamp(self) -> Stamp:
        """What changes when its files are replaced or written over."""
        ...

    def read(self) -> tuple[bytes, bytes]:
        """Return config and weights as they are at one moment.

        Raises:
            ReftError: a file is missing, or they change while they are read.
            OSError: they cannot be reached now.
        """
        ...


class Source(Protocol):
    """Where folders are."""

    seconds: float  # for which an answer of `folders` is not asked for again

    def folders(self) -> Mapping[str, Folder]:
        """Return the folders that hold an adapter, by name."""
        ...


def find_source(where: str | os.PathLike) -> Source:
    """Return the source for a directory or a URL.

    Raises:
        ReftError: there is no such place.
    """
    return Bucket(os.fspath(where)) if "://" in os.fspath(where) else Directory(where)


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.is_dir()

    def stamp(self) -> Stamp:
        found: list[int] = []
        for name in (CONFIG, WEIGHTS):
            try:
                status = os.stat(self.path / name)
            except OSError:
                found.append(-1)
                continue
            if not stat.S_ISREG(status.st_mode):
                found.append(-2)
            found += [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        return tuple(found)

    def read(self) -> tuple[bytes, bytes]:
        """Read both files; a writer in between is waited for."""
        path = self.path
        for _ in range(_TRIES):
            with reading(path):  # which keeps our own saves out; a program of PEFT's knows nothing of it
                before = self.stamp()
                try:
                    config, weights = (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()
                    changed = max(os.stat(path / name).st_ctime for name in (CONFIG, WEIGHTS))
                except FileNotFoundError as error:
                    missing = Path(error.filename or path).name
                    raise ReftError(f"{path}: expected an adapter's directory, found no {missing}.") from None
            if time.time() - changed < _SETTLED:
                time.sleep(_SETTLED)
            if self.stamp() == before:
                return config, weights
        raise _restless(path)


class Directory:
    """The folders of a directory."""

    seconds = 0.5

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ReftError(f"{self.path}: expected a directory with a folder for each adapter.")
        if _holds_adapter(str(self.path)) and not self.folders():
            raise ReftError(
                f"{self.path} is an adapter itself: expected the directory whose folders are the adapters.",
                setting="adapters",
            )
        with os.scandir(self.path) as entries:
            unnamed = [entry.name for entry in entries if entry.name[0] != "." and not NAME.fullmatch(entry.name)]
        for name in sorted(unnamed):
            if _holds_adapter(str(self.path / name)):
                _log.warning("%r cannot be the name of a model; rename this folder of %s.", name, self.path)

    def folders(self) -> dict[str, Folder]:
        found: dict[str, Folder] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and _holds_adapter(entry.path):
                    found[entry.name] = LocalFolder(Path(entry.path))
        return found

    def folder(self, name: str) -> Folder | None:
        """Return the one with this name, if it holds an adapter."""
        if "/" in name or not NAME.fullmatch(name) or not _holds_adapter(str(self.path / name)):
            return None
        return LocalFolder(self.path / name)


class RemoteFolder:
    """A folder behind fsspec, as it was when it was listed."""

    def __init__(self, fs: Any, path: str, listed: Mapping[str, Mapping[str, object]]) -> None:
        self.fs, self.path = fs, path
        self._stamp = _told(listed)

    def __str__(self) -> str:
        return self.fs.unstrip_protocol(self.path)

    def exists(self) -> bool:
        return True

    def stamp(self) -> Stamp:
        return self._stamp

    def read(self) -> tuple[bytes, bytes]:
        paths = {name: f"{self.path}/{name}" for name in (CONFIG, WEIGHTS)}
        for _ in range(_TRIES):
            before = self._look(paths)
            with _reaching(self):
                config, weights = (self.fs.cat_file(path) for path in paths.values())
            if self._look(paths) == before:
                return config, weights
        raise _restless(self)

    def _look(self, paths: Mapping[str, str]) -> Stamp:
        with _reaching(self):
            self.fs.invalidate_cache(self.path)
            return _told({name: self.fs.info(path) for name, path in paths.items()})


class Bucket:
    """The folders at a URL, by fsspec.

    The files are listed at most every `seconds`, by one thread while others go by the last list; so are changes seen.
    While the place cannot be reached, the last list stays.

    Args:
        url: such as `s3://bucket/adapters`; fsspec's package for it has to be installed.
        seconds: for how long a list is good.
    """

    def __init__(self, url: str, seconds: float = 5.0) -> None:
        import fsspec

        self.url, self.seconds = url, seconds
        self._listing = threading.Lock()
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
            there = self.fs.isdir(self.root)
            self._known = self._list()
        except Exception as error:  # each of fsspec's packages has its own
            raise ReftError(f"{url} cannot be reached: {error}", setting="adapters") from None
        if not there:
            raise ReftError(f"{url}: expected a place with a folder for each adapter.", setting="adapters")

    def folders(self) -> dict[str, Folder]:
        if self._listing.acquire(blocking=False):
            try:
                self._known = self._list()
            except Exception as error:
                _log.warning("%s could not be listed; the last list stays: %s", self.url, error)
            finally:
                self._listing.release()
        return self._known

    def _list(self) -> dict[str, Folder]:
        self.fs.invalidate_cache(self.root)
        listed: dict[str, dict[str, Any]] = {}
        root = self.fs._strip_protocol(self.root).rstrip("/") + "/"
        for path, about in self.fs.find(self.root, detail=True).items():
            folder, slash, name = path.removeprefix(root).partition("/")
            if slash and name in (CONFIG, WEIGHTS) and NAME.fullmatch(folder):
                listed.setdefault(folder, {})[name] = about
        return {name: RemoteFolder(self.fs, root + name, files) for name, files in listed.items() if CONFIG in files}


@contextmanager
def _reaching(folder: Folder) -> Iterator[None]:
    """What goes wrong within it is said of a folder: a file that is missing, or a place that cannot be reached."""
    try:
        yield
    except FileNotFoundError:
        raise ReftError(f"{folder}: expected {CONFIG} and {WEIGHTS}, found not both.") from None
    except Exception as error:  # each of fsspec's packages has its own
        raise OSError(f"{folder} cannot be reached: {error}") from error


def _told(files: Mapping[str, Mapping[str, object]]) -> Stamp:
    """What a file system tells of files: sizes, times, tags."""
    return tuple((name, *sorted((key, str(value)) for key, value in files[name].items())) for name in sorted(files))


def _restless(where: object) -> ReftError:
    return ReftError(f"{where}: the files change while they are read; ask again when they are written.")


def _holds_adapter(path: str) -> bool:
    try:  # while a save is put in place, its config is away
        return os.path.isfile(os.path.join(path, CONFIG)) or is_adapter(path)
    except ReftError:  # which is told to those who ask for it
        return True
    except OSError:  # a name too long for a file's, or a folder of somebody else's
        return False
