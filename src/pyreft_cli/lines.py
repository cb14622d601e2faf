"""The lines that a user types: with editing, and with those of earlier times at the arrow keys."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

try:
    import readline
except ImportError:  # Windows, whose console edits lines by itself
    readline = None  # type: ignore[assignment]

_KEPT = 1000  # lines


def typed() -> Iterator[str]:
    """Yield the lines, without spaces around them, up to the end of the input or a key to interrupt."""
    if sys.stdin is None:  # closed
        return
    talks = sys.stdin.isatty()
    history = _history() if talks and readline is not None else None
    try:
        while True:
            yield input("> " if talks else "").strip()
    except (EOFError, KeyboardInterrupt):
        if talks:
            print()
    finally:
        if history is not None:
            _keep(history)


def _history() -> Path:
    """Read what was typed before, and return where it is kept."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "pyreft" / "chat_history"
    readline.set_history_length(_KEPT)
    with suppress(OSError):
        readline.read_history_file(path)
    return path


def _keep(path: Path) -> None:
    """Keep what was typed, for nobody else to read; a conversation is not ended by a directory that cannot be made."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)
