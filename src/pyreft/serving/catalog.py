"""From names to adapters: a place that is watched, and a store in which what was once resolved never changes.

A name is resolved once, where a request comes in. What goes on from there is the digest of the adapter's files, by
which every process finds the same copy of them in the store, so that an exchange of files under a name can never mix
old and new. Only names of its folders are known; a request cannot name a path. Knows no engine.
"""

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import ReftError, did_you_mean
from ..files.user_cache import user_cache
from .served import CONFIG, WEIGHTS, Adapter, digest_of, read_adapter
from .sources import NAME, Directory, Folder, LocalFolder, RemoteFolder, Stamp, find_source

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
SHARE = 20  # times as long as it takes to list a place, a list is good at least


def default_store() -> Path:
    """Where copies are kept: `$PYREFT_STORE`, or a folder of the user's cache."""
    return Path(os.environ.get("PYREFT_STORE") or user_cache() / "served")


class StoreError(OSError):
    """A store cannot take an adapter: its disk is full, may not be written, or cannot be reached."""


class Store:
    """Copies of adapters by digest, the same for all processes of a user that name the same folder."""

    KNOWN = 4096  # adapters whose configs a process remembers

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root) if root is not None else default_store()
        self._known: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, where: Folder | Path) -> Adapter:
        """Copy an adapter into the store, if it is not there, and return it.

        Raises:
            ReftError: no adapter, one that cannot be served, or files that change while they are read.
            StoreError: the store cannot take it.
            OSError: its files cannot be reached now.
        """
        folder = LocalFolder(where) if isinstance(where, Path) else where
        return self.put(*folder.read(), called=str(folder))

    def put(self, config: bytes, weights: bytes, called: str = "the adapter") -> Adapter:
        """Copy an adapter's files into the store, and return it; errors call it as is said.

        Raises:
            ReftError: no adapter, or one that cannot be served.
            StoreError: the store cannot take it.
        """
        digest = digest_of(config, weights)
        try:
            if not self.has(digest):
                self._copy(digest, config, weights, called)
        except OSError as error:
            raise StoreError(f"{self.root} cannot take an adapter: {error.strerror or error}") from error
        return self.get(digest)

    def _copy(self, digest: str, config: bytes, weights: bytes, called: str) -> None:
        target = self.root / digest
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            (staged / CONFIG).write_bytes(config)
            (staged / WEIGHTS).write_bytes(weights)
            adapter = read_adapter(staged, digest)
            adapter.edits()  # refused now, or never
            os.replace(staged, target)
            with self._lock:
                self._remember(replace(adapter, directory=target))
        except ReftError as error:
            raise ReftError(str(error).replace(str(staged), called)) from None
        except OSError:
            if not target.is_dir():  # or else another process was faster
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def get(self, digest: str) -> Adapter:
        """Return an adapter by its digest.

        Raises:
            ReftError: it is not in the store, or no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise ReftError(f"expected the digest of an adapter in the store, got {digest!r}.", setting="reft")
        with self._lock:
            if digest not in self._known:
                path = self.root / digest
                if not path.is_dir():
                    raise ReftError(f"no adapter {digest[:12]} in the store {self.root}.", setting="reft")
                self._remember(read_adapter(path, digest))
            self._known.move_to_end(digest)
            return self._known[digest]

    def has(self, digest: str) -> bool:
        """Whether an adapter's copy is there now."""
        return (self.root / digest).is_dir()

    def _remember(self, adapter: Adapter) -> None:
        self._known[adapter.digest] = adapter
        if len(self._known) > self.KNOWN:
            self._known.popitem(last=False)

    def touch(self, digest: str) -> None:
        """Note that an adapter was asked for, so that `prune` leaves it."""
        os.utime(self.root / digest)

    def discard(self, digest: str) -> None:
        """Delete a copy that no request asks for any more."""
        with self._lock:
            self._known.pop(digest, None)
        shutil.rmtree(self.root / digest, ignore_errors=True)

    def prune(self, seconds: float) -> int:
        """Delete what nobody has asked for in so many seconds; return how many copies went."""
        gone = 0
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            if (_DIGEST.fullmatch(path.name) or path.name.startswith(".new-")) and _age(path) > seconds:
                self.discard(path.name)
                gone += 1
        return gone


class Catalog:
    """The adapters that clients may name: the folders of a place that hold one, and those loaded by hand.

    Args:
        place: a directory or a URL whose folders are the adapters; they may come, change and go while it is served.
        store: where copies are kept.
        check: raises `ReftError` for an adapter that does not fit the engine, such as one of another base model.
        seconds: for how long the list of the place is not made again, by default as is right for its kind.
    """

    def __init__(
        self,
        place: str | os.PathLike | None,
        store: Store | None = None,
        check: Callable[[Adapter], None] | None = None,
        seconds: float | None = None,
    ) -> None:
        self.source = None if place is None else find_source(place)
        self.store = Store() if store is None else store
        self.check = check or (lambda adapter: None)
        if seconds is None:
            seconds = 0.0 if self.source is None else self.source.seconds
        self._seconds = seconds
        self._listed: Mapping[str, Folder] = {}
        self._next = float("-inf")  # when it is to be listed
        self._resolved: dict[str, tuple[Stamp, Adapter | ReftError]] = {}
        self._loaded: dict[str, Folder] = {}
        self._unloaded: dict[str, Stamp] = {}  # by name, the files that were taken away
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """All names, of adapters that can be served and of those that are refused when they are asked for."""
        listed = (name for name, folder in self._list().items() if not self._is_unloaded(name, folder))
        return sorted({*listed, *self._loaded})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._folder(name) is not None

    def rank(self) -> int:
        """The rank that all adapters here fit in, at least 8.

        Those that cannot be served do not count, nor do those at a URL, of which there may be many thousands.
        """
        ranks = [8]
        for folder in map(self._folder, self.names()):
            if not isinstance(folder, LocalFolder):
                continue
            try:
                ranks.append(read_adapter(folder.path, digest="").rank)
            except ReftError:
                continue
        return max(ranks)

    def resolve(self, name: str) -> Adapter:
        """Return the adapter that a name stands for now.

        Raises:
            KeyError: nothing has this name.
            ReftError: what has it cannot be served.
            StoreError: the store cannot take it now.
            OSError: its files cannot be reached now.
        """
        folder = self._folder(name)  # without the lock, as the files: requests for other adapters go on
        if folder is None or not folder.exists():  # it may have gone since it was listed
            raise KeyError(name)
        stamp = folder.stamp()
        with self._lock:
            known = self._resolved.get(name)
        if known is None or known[0] != stamp:
            known = stamp, self._read(folder)
            with self._lock:
                self._resolved[name] = known
        if isinstance(known[1], ReftError):
            if not folder.exists():  # or gone while it was read
                raise KeyError(name)
            raise known[1]
        try:
            self.store.touch(known[1].digest)
        except FileNotFoundError:  # its copy was deleted
            return self.store.add(folder)
        except OSError as error:  # such as a disk that may not be written; the copy is there
            _log.warning("%s: %s", self.store.root, error)
        return known[1]

    def peek(self, name: str) -> Adapter | None:
        """The same, but none for an adapter at a URL that nobody has asked for: it is not fetched to be listed."""
        if name not in self._resolved and isinstance(self._folder(name), RemoteFolder):
            return None
        return self.resolve(name)

    def load(self, name: str, path: str | os.PathLike) -> Adapter:
        """Give a name to an adapter's directory, or to a folder of this one, until it is unloaded.

        Raises:
            ReftError: a name that is taken or none, or no adapter that can be served.
            StoreError: the store cannot take it now.
            OSError: its files cannot be reached now.
        """
        if not NAME.fullmatch(name) or ".." in name:
            raise ReftError(
                f"expected letters, digits and ._-+:=@, and one slash at most, got {name!r}.", setting="name"
            )
        where = LocalFolder(Path(path))
        found = self._read(where)
        if isinstance(found, ReftError):
            raise found
        with self._lock:
            if name in self and self._loaded.get(name) != where:
                raise ReftError(f"{name!r} is taken; unload it first.", setting="name")
            self._unloaded.pop(name, None)
            self._loaded[name] = where
            self._resolved[name] = where.stamp(), found
        return found

    def unload(self, name: str) -> None:
        """Take a name away. A folder of the directory is left alone, and has its name again once its files change.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            folder = self._folder(name)
            if folder is None:
                raise KeyError(name)
            if self._loaded.pop(name, None) is None:
                self._unloaded[name] = folder.stamp()
            self._resolved.pop(name, None)

    def unknown(self, name: str) -> str:
        """What to say of a name that nothing has."""
        return f"The model {name!r} does not exist.{did_you_mean(name, self.names())}"

    def _list(self) -> Mapping[str, Folder]:
        """The folders of the place, looked up again once the last answer is old; a list of many is kept for longer."""
        began = time.monotonic()
        if self.source is not None and began >= self._next:
            self._listed = self.source.folders()
            took = time.monotonic() - began
            self._next = began + (max(self._seconds, SHARE * took) if self._seconds else 0.0)
        return self._listed

    def _folder(self, name: str) -> Folder | None:
        """What a name stands for now: of a directory's thousand folders only this one is looked at."""
        if (folder := self._loaded.get(name)) is not None:
            return folder
        folder = self.source.folder(name) if isinstance(self.source, Directory) else self._list().get(name)
        return None if folder is None or self._is_unloaded(name, folder) else folder

    def _is_unloaded(self, name: str, folder: Folder) -> bool:
        return name in self._unloaded and self._unloaded[name] == folder.stamp()

    def _read(self, folder: Folder) -> Adapter | ReftError:
        try:
            adapter = self.store.add(folder)
            self.check(adapter)
            return adapter
        except ReftError as error:
            return error


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
