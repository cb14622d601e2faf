"""What the Hugging Face hub refuses, told in a line."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ReftError, is_disk_full


@contextmanager
def hub_told(problem: str, hint: str = "", setting: str | None = None) -> Iterator[None]:
    """Raise what goes wrong with the hub in the block as one error: the problem, the cause, and what to do.

    A full disk is told as it is elsewhere.

    Raises:
        ReftError: with the first line of what the hub, or the way to it, says.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        if is_disk_full(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftError(f"{problem}: {first}{hint}", setting=setting) from None
