"""PEFT knows the method once both packages are imported, in whichever order; neither is imported for the other's sake.

What makes it known is `pyreft.tuner`, as soon as it is imported. Here is only when that is.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TUNER = "pyreft.tuner"


def tell_peft() -> None:
    """Make PEFT know the method: now if PEFT is there, or else right after it is imported."""
    if "peft" in sys.modules:
        importlib.import_module(TUNER)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds PEFT as the other finders do, and imports the tuner behind it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(TUNER)  # which goes on being imported if PEFT is imported by it

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
