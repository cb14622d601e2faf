"""Prompts in, answers out, in batches of any lengths."""

from collections.abc import Iterator, Mapping, Sequence
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
    decoding: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield the answer to each text, which is what the model reads as it stands (see `data.encode.prompt_text`).

    Args:
        model: a causal language model, adapted or not.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        decoding: arguments of `generate` instead of these two, such as `num_beams`; a temperature draws tokens.
    """
    rows = [token_ids(tokenizer, text) for text in texts]
    found = answer_ids(
        model,
        tokenizer,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        decoding=decoding,
    )
    for answer in found:
        yield tokenizer.decode(answer, skip_special_tokens=True)


def answer_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    strength: float | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> Iterator[list[int]]:
    """Yield the answer to each row of token ids as ids, up to its end, which belongs to it if it was reached.

    Args:
        model, temperature, decoding: see `generate_answers`.
        strength: what an adapted model's edits are multiplied by.
    """
    options: dict[str, Any] = dict(decoding or {"max_new_tokens": max_new_tokens})
    if temperature > 0:
        options.setdefault("temperature", temperature)
    options |= {"do_sample": "temperature" in options, "pad_token_id": tokenizer.pad_token_id}
    if strength is not None:
        options["strength"] = strength
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    for start in range(0, len(rows), batch_size):
        part = {"input_ids": list(rows[start : start + batch_size])}
        batch = tokenizer.pad(part, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            tokens = model.generate(**batch, **options)
        for answer in tokens[:, batch["input_ids"].shape[1] :].tolist():
            end = next((number for number, token in enumerate(answer, 1) if token in ends), len(answer))
            yield answer[:end]
