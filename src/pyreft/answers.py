"""Prompts in, answers out, in batches of any lengths."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .data.encode import token_ids


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yield the answer to each text, which is what the model reads as it stands (see `data.encode.prompt_text`).

    Args:
        model: a causal language model, adapted or not.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
    """
    options = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    if temperature > 0:
        options["temperature"] = temperature
    for start in range(0, len(texts), batch_size):
        rows = [token_ids(tokenizer, text) for text in texts[start : start + batch_size]]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            tokens = model.generate(**batch, **options)
        yield from tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
