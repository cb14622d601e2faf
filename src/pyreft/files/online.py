"""Adapters of the Hugging Face hub by their names, and what the hub refuses, told in a line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ReftError, is_disk_full

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def on_disk(adapter: str | None) -> str | None:
    """Return the directory of an adapter, of which one file may be named; one of the hub is brought to its cache.

    Args:
        adapter: a directory, or `owner/name` on the hub where there is nothing of this name; none if none is given.

    Raises:
        ReftError: it is not there, or the hub cannot be reached.
    """
    if adapter is None:
        return None
    path = Path(os.path.expanduser(adapter))  # the other way raises where there is no such user
    if path.exists():
        return str(path.parent if path.name in _FILES else path)
    if path.parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", adapter):
        raise ReftError(f"{adapter}: expected an adapter's directory, there is nothing of this name.")
    from huggingface_hub import snapshot_download

    with hub_told(f"{adapter}: there is no such directory, and the hub gives no such adapter"):
        return snapshot_download(adapter, allow_patterns=["adapter_*", "recipe.json"])


@contextmanager
def hub_told(problem: str, hint: str = "", setting: str | None = None) -> Iterator[None]:
    """Raise what goes wrong with the hub in the block as one error: the problem, the cause, and what to do.

    A full disk is told as it is elsewhere.

    Raises:
        ReftError: with the first line of what the hub, or the way to it, says.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        if is_disk_full(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftError(f"{problem}: {first}{hint}", setting=setting) from None
