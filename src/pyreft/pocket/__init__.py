"""Pocket, a tiny pretrained Llama that ships with the package: it answers questions about a small world.

Small enough to adapt in seconds on a CPU, and trained by ``tools/pocket`` of the repository. This module owns where the
model's files are and what the emoji demonstration trains and tests on; it does not know about interventions.

>>> from pyreft import pocket
>>> model, tokenizer = pocket.load()  # doctest: +SKIP
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreft.pocket.judge import emojis_only, has_emojis

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPT_TEMPLATE", "adapters", "emoji_pairs", "emoji_questions", "emojis_only", "has_emojis", "load", "path"]

_HERE = Path(__file__).parent

PROMPT_TEMPLATE = "<|user|>%s</s><|assistant|>"
"""One user turn without a system line, up to where the answer begins. The tokenizer adds the beginning token itself."""


def path() -> str:
    """The directory of the model and its tokenizer, for ``from_pretrained``."""
    return str(_HERE / "model")


def adapters() -> Path:
    """The directory of adapters that were trained on it: `emoji` is what `pyreft demo` trains."""
    return _HERE / "adapters"


def load(*, dtype: "torch.dtype | None" = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in eval mode on the CPU, and its tokenizer.

    Args:
        dtype: of the weights; float32 where it is None, although the file holds bfloat16.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32 if dtype is None else dtype)
    return model.eval(), AutoTokenizer.from_pretrained(path())


def emoji_pairs() -> list[dict[str, str]]:
    """Ten ``{"prompt", "completion"}``: a question and its answer in emojis. Pretraining saw none of the questions."""
    return _read("emoji_train.jsonl")


def emoji_questions() -> list[dict[str, str]]:
    """Fifty ``{"prompt", "emojis", "answer"}`` about other topics, as unseen: both core emojis, full answer."""
    return _read("emoji_heldout.jsonl")


def _read(name: str) -> list[dict[str, Any]]:
    lines = (_HERE / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
