"""An adapter to the hub: what can be checked is checked before the training, and the upload is the adapter alone."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_token, validate_repo_id

from ..errors import ReftError
from ..files.online import hub_told
from .output import CHECKPOINTS


def check_repository(name: str) -> None:
    """Make a repository that is not there, so that the upload finds it.

    Raises:
        ReftError: a name that none can have, nobody is logged in, or the hub refuses it or cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ReftError(f"expected owner/name, got {name!r}: {error}", setting="push_to_hub") from None
    if get_token() is None:
        raise ReftError("nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN.", setting="push_to_hub")
    with hub_told(f"{name!r} cannot be written", setting="push_to_hub"):
        HfApi().create_repo(name, private=True, exist_ok=True)


def publish(directory: Path, name: str) -> str:
    """Upload an adapter's directory without its checkpoints; return the address.

    Raises:
        ReftError: the hub refuses it or cannot be reached; the directory stays as it is.
    """
    later = f" Later: hf upload {name} {directory} --exclude '{CHECKPOINTS}/*'"
    with hub_told(f"the adapter is in {directory}, but was not uploaded", later, setting="push_to_hub"):
        found = HfApi().upload_folder(
            repo_id=name, folder_path=directory, commit_message="Add an adapter", ignore_patterns=[f"{CHECKPOINTS}/**"]
        )
    return str(found.repo_url)
