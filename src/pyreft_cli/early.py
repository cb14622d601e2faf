"""A look at a command's settings and data files before the libraries load, so that what is wrong is told at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyreft.data.files import Reading, read_examples  # without torch, transformers or PEFT
from pyreft.data.tables import ENDINGS
from pyreft.jobs.limits import check_values

_WHOLE = 64 * 2**20  # bytes of a file that is read to its end
_ROWS = 1000  # that are read of a larger one
_READING = {"turns": str, "prompt_field": str, "completion_field": str, "encoding": str, "on_error": str, "limit": int}


def check_data(settings: Mapping[str, Any]) -> None:
    """Check the values of some settings, and read the files of examples that they name.

    Raises:
        ReftError: a value that none can have, a file that is not there, or rows that are wrong; of a large file, among
            its first thousand.
    """
    check_values(settings)
    files = [settings.get("data"), settings.get("validation")]
    given = {name: settings[name] for name in _READING if settings.get(name) is not None}
    if settings.get("suite") or not all(isinstance(value, _READING[name]) for name, value in given.items()):
        return  # a setting of another type is told with the others
    for path in (Path(file) for file in files if isinstance(file, str)):
        if path.exists() or path.suffix.lower() in ENDINGS:
            whole = not path.exists() or (path.is_file() and path.stat().st_size <= _WHOLE)
            most = {} if whole else {"limit": min(given.get("limit") or _ROWS, _ROWS)}
            read_examples(path, Reading(**given | most))
