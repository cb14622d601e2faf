"""Where a user's programs keep what they can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """This package's folder in the user's cache: in `$XDG_CACHE_HOME` if that is set, else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyreft"
