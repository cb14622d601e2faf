"""Representation finetuning (ReFT): learn small edits of the hidden states of a frozen Hugging Face model.

Importing this package makes PEFT know the method: any PEFT, transformers or TRL entry point takes a `ReftConfig`.
Importing it imports nothing else: a name of `__init__.pyi`, or a module, comes when it is first used.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from .registration import tell_peft

__version__ = "0.2.0.dev0"

# the public names, each with the module where it lives
_HOMES = {
    alias.name: "." * node.level + str(node.module)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)

tell_peft()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # so that it is asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
