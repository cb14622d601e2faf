"""From names to adapters: a directory that is watched, and a store in which what was once resolved never changes.

A name is resolved once, where a request comes in. What goes on from there is the digest of the adapter's files, by
which every process finds the same copy of them in the store, so that an exchange of files under a name can never mix
old and new. Only names in the directory are known; a request cannot name a path. Knows no engine.
"""

import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import ReftError, did_you_mean
from ..files.adapter import is_adapter
from ..files.together import reading
from ..files.user_cache import user_cache
from .served import CONFIG, WEIGHTS, Adapter, digest_of, read_adapter

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w][\w.@+:=-]*(?:/[\w][\w.@+:=-]*)?")  # one slash at most, as in the names of a hub
Stamp = tuple[int, ...]


def default_store() -> Path:
    """Where copies are kept: `$PYREFT_STORE`, or a folder of the user's cache."""
    return Path(os.environ.get("PYREFT_STORE") or user_cache() / "served")


class Store:
    """Copies of adapters by digest, the same for all processes of a user that name the same folder."""

    KNOWN = 4096  # adapters whose configs a process remembers

    def __init__(self, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root) if root is not None else default_store()
        self._known: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, directory: Path) -> Adapter:
        """Copy an adapter into the store, if it is not there, and return it.

        Raises:
            ReftError: no adapter, one that cannot be served, or files that change while they are read.
        """
        return self.put(*_read_settled(directory), called=str(directory))

    def put(self, config: bytes, weights: bytes, called: str = "the adapter") -> Adapter:
        """Copy an adapter's files into the store, and return it; errors call it as is said.

        Raises:
            ReftError: no adapter, or one that cannot be served.
        """
        digest = digest_of(config, weights)
        target = self.root / digest
        if not target.is_dir():
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
        return self.get(digest)

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
    """The adapters that clients may name: the folders of a directory that hold one, and those loaded by hand.

    Args:
        directory: whose folders are the adapters; they may come, change and go while it is served.
        store: where copies are kept.
        check: raises `ReftError` for an adapter that does not fit the engine, such as one of another base model.
        seconds: for how long an answer about the directory is not looked up again.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        store: Store | None = None,
        check: Callable[[Adapter], None] | None = None,
        seconds: float = 0.5,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None and not self.directory.is_dir():
            raise ReftError(f"{self.directory}: expected a directory with a folder for each adapter.")
        self.store = Store() if store is None else store
        self.check = check or (lambda adapter: None)
        self._seconds = seconds
        self._listed: tuple[float, dict[str, Path]] = (float("-inf"), {})
        self._resolved: dict[str, tuple[Stamp, Adapter | ReftError]] = {}
        self._loaded: dict[str, Path] = {}
        self._unloaded: dict[str, Stamp] = {}  # by name, the files that were taken away
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """All names, of adapters that can be served and of those that are refused when they are asked for."""
        return sorted(self._paths())

    def rank(self) -> int:
        """The rank that all adapters here fit in, at least 8; those that cannot be served do not count."""
        ranks = [8]
        for path in self._paths().values():
            try:
                ranks.append(read_adapter(path, digest="").rank)
            except ReftError:
                continue
        return max(ranks)

    def resolve(self, name: str) -> Adapter:
        """Return the adapter that a name stands for now.

        Raises:
            KeyError: nothing has this name.
            ReftError: what has it cannot be served.
        """
        with self._lock:
            path, known = self._paths().get(name), self._resolved.get(name)
        if path is None or not path.is_dir():  # it may have gone since it was listed
            raise KeyError(name)
        stamp = _stamp(path)
        if known is None or known[0] != stamp:
            known = stamp, self._read(path)  # without the lock: requests for other adapters go on
            with self._lock:
                self._resolved[name] = known
        if isinstance(known[1], ReftError):
            if not path.is_dir():  # or gone while it was read
                raise KeyError(name)
            raise known[1]
        try:
            self.store.touch(known[1].digest)
        except OSError:  # its copy was deleted
            return self.store.add(path)
        return known[1]

    def load(self, name: str, path: str | os.PathLike) -> Adapter:
        """Give a name to an adapter's directory, or to a folder of this one, until it is unloaded.

        Raises:
            ReftError: a name that is taken or none, or no adapter that can be served.
        """
        if not _NAME.fullmatch(name) or ".." in name:
            raise ReftError(
                f"expected letters, digits and ._-+:=@, and one slash at most, got {name!r}.", setting="name"
            )
        where = Path(path)
        found = self._read(where)
        if isinstance(found, ReftError):
            raise found
        with self._lock:
            if name in self._paths() and self._loaded.get(name) != where:
                raise ReftError(f"{name!r} is taken; unload it first.", setting="name")
            self._unloaded.pop(name, None)
            self._loaded[name] = where
            self._resolved[name] = _stamp(where), found
        return found

    def unload(self, name: str) -> None:
        """Take a name away. A folder of the directory is left alone, and has its name again once its files change.

        Raises:
            KeyError: nothing has this name.
        """
        with self._lock:
            path = self._paths().get(name)
            if path is None:
                raise KeyError(name)
            if self._loaded.pop(name, None) is None:
                self._unloaded[name] = _stamp(path)
            self._resolved.pop(name, None)

    def unknown(self, name: str) -> str:
        """What to say of a name that nothing has."""
        return f"The model {name!r} does not exist.{did_you_mean(name, self.names())}"

    def _paths(self) -> dict[str, Path]:
        now = time.monotonic()
        if now - self._listed[0] >= self._seconds:
            self._listed = now, _folders(self.directory) if self.directory is not None else {}
        listed = {
            name: path
            for name, path in self._listed[1].items()
            if name not in self._unloaded or self._unloaded[name] != _stamp(path)
        }
        return {**listed, **self._loaded}

    def _read(self, path: Path) -> Adapter | ReftError:
        try:
            adapter = self.store.add(path)
            self.check(adapter)
            return adapter
        except ReftError as error:
            return error


def _folders(directory: Path) -> dict[str, Path]:
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and _holds_adapter(entry.path):
                found[entry.name] = Path(entry.path)
    return found


def _holds_adapter(path: str) -> bool:
    try:  # while a save is put in place, its config is away
        return os.path.isfile(os.path.join(path, CONFIG)) or is_adapter(path)
    except ReftError:  # which is told to those who ask for it
        return True


def _stamp(path: Path) -> Stamp:
    """What changes when an adapter's files are replaced or written over."""
    found: list[int] = []
    for name in (CONFIG, WEIGHTS):
        try:
            status = os.stat(path / name)
        except OSError:
            found.append(-1)
            continue
        if not stat.S_ISREG(status.st_mode):
            found.append(-2)
        found += [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return tuple(found)


_SETTLED = 0.1  # seconds: both files are replaced one after the other


def _read_settled(path: Path, tries: int = 20) -> tuple[bytes, bytes]:
    """Read both files as they are at one moment: a writer in between is waited for."""
    for _ in range(tries):
        with reading(path):  # which keeps our own saves out; a program of PEFT's knows nothing of it
            before = _stamp(path)
            try:
                config, weights = (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()
                changed = max(os.stat(path / name).st_ctime for name in (CONFIG, WEIGHTS))
            except FileNotFoundError as error:
                missing = Path(error.filename or path).name
                raise ReftError(f"{path}: expected an adapter's directory, found no {missing}.") from None
        if time.time() - changed < _SETTLED:
            time.sleep(_SETTLED)
        if _stamp(path) == before:
            return config, weights
    raise ReftError(f"{path}: the files change while they are read; ask again when they are written.")


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
