"""Prompts and answers as a training set: token ids, labels on the answers, and locations in the prompts.

Knows tokenizers and lists, nothing of models or edits.
"""

import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ..errors import ReftError
from ..files.text import check_characters
from ..positions import IGNORED
from .boundary import pair_ids


@dataclass
class ReftDataCollator:
    """Pads a batch with another collator and brings its `intervention_locations` to one shape.

    Locations are token indices in rows that start at the first token. A column `subspaces` stays a list.

    Args:
        data_collator: pads `input_ids` and `labels`, such as transformers' `DataCollatorForSeq2Seq`.
        shift: move the locations with left padding. Programs for the original, whose collator did not, do it
            themselves; a batch with labels that would need it warns.
    """

    data_collator: Callable[[list[dict]], Mapping[str, Any]]
    shift: bool = False

    def __call__(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [
            {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in instance.items()}
            for instance in instances
        ]
        locations = [row.pop("intervention_locations", None) for row in rows]
        subspaces = [row.pop("subspaces", None) for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        batch = dict(self.data_collator(rows))
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.dim() == 2 and bool((labels == IGNORED).all()):
            raise ReftError(
                f"all {len(rows)} rows of a batch have nothing but {IGNORED}, so nothing can be learned "
                "from them; does a prompt fill the context, or is the answer masked?",
                setting="labels",
            )
        if any(at is not None for at in locations):
            width = batch["input_ids"].shape[-1] if self._pads_left() else 0
            shifts = [max(width - length, 0) for length in lengths]
            if not self.shift and any(shifts):
                shifts = [0] * len(rows)
                if labels is not None:
                    tell_of_left_padding(self)
            batch["intervention_locations"] = stack_locations(locations, shifts)
        if any(chosen is not None for chosen in subspaces):
            batch["subspaces"] = subspaces
        return batch

    def _pads_left(self) -> bool:
        return getattr(getattr(self.data_collator, "tokenizer", None), "padding_side", "right") == "left"


def tell_of_left_padding(collator: Any) -> None:
    """Warn that a collator leaves locations as they are, in a batch that is padded on the left."""
    warnings.warn(
        "The tokenizer pads on the left, and intervention_locations stay as they are, as in the original: pass "
        f"{type(collator).__name__}(..., shift=True) if they count from the first token of a row.",
        stacklevel=3,
    )


def stack_locations(locations: list[Any], shifts: list[int]) -> torch.Tensor:
    """`[batch][interventions][positions]`, ragged in the positions, as a tensor filled with -1.

    Raises:
        ReftError: another nesting, or anything but indices, such as a mask.
    """
    rows = plain(locations)
    for number, row in enumerate(rows):
        nested = isinstance(row, list) and all(isinstance(part, list) for part in row)
        if not nested or len(row) != len(rows[0]) or not all(_is_location(at) for part in row for at in part):
            raise ReftError(
                f"row {number} of the batch: expected indices of tokens (-1 for none), [interventions][positions], "
                f"as many interventions in each row, got {reprlib.repr(row)}.",
                setting="intervention_locations",
            )
    width = max(len(places) for row in rows for places in row)
    return torch.tensor(
        [
            [[int(at) + shift if at >= 0 else -1 for at in places] + [-1] * (width - len(places)) for places in row]
            for row, shift in zip(rows, shifts, strict=True)
        ]
    )


def plain(nested: Any) -> Any:
    """Tensors, arrays and tuples, at whatever depth, as lists and numbers."""
    if hasattr(nested, "tolist"):
        return nested.tolist()
    return [plain(part) for part in nested] if isinstance(nested, list | tuple) else nested


def _is_location(at: Any) -> bool:
    return isinstance(at, int | float) and not isinstance(at, bool) and at >= -1 and at == int(at)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, end: bool = True, number: int = 0
) -> tuple[list[int], int]:
    """Return the token ids of a prompt and its answer, and how many of them are the prompt's.

    Args:
        end: close the answer with the tokenizer's EOS token.
        number: which example this is, for messages.

    Raises:
        ReftError: what is no text, a prompt that leaves no room for an answer within `tokenizer.model_max_length`, or
            an EOS token that is asked for and not there.
    """
    if end and tokenizer.eos_token is None:
        raise ReftError(
            "The tokenizer has no EOS token: set tokenizer.eos_token, or pass nonstop=True, to a data set no_stop=True."
        )
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str):
            raise ReftError(f"Example {number}: the {name} should be text, got {text!r}.")
        check_characters(text, f"Example {number}: the {name}")
    limit = tokenizer.model_max_length
    prompt_ids, answer_ids = pair_ids(tokenizer, prompt, answer + (tokenizer.eos_token if end else ""), doubled=True)
    if len(prompt_ids) >= limit or not answer_ids:
        raise ReftError(
            f"Example {number}: the prompt of {len(prompt_ids)} tokens leaves no room for an answer within "
            f"tokenizer.model_max_length = {limit}."
        )
    return (prompt_ids + answer_ids)[:limit], len(prompt_ids)


def told_of_doubled_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], number: int) -> bool:
    """Warn if a text brings the BOS token along that the tokenizer puts before it; say whether it does.

    Args:
        ids: of the text, as many as there are, from its first one.
        number: which row this is, for the message.
    """
    bos = tokenizer.bos_token_id
    doubled = bos is not None and list(ids[:2]) == [bos, bos]
    if doubled:
        warnings.warn(
            f"Row {number}: the prompt begins with {tokenizer.bos_token!r} and the tokenizer adds another one; leave "
            "it out of the text. Other rows of this data set are not told.",
            stacklevel=2,
        )
    return doubled


def make_data_module(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str],
    outputs: Sequence[str],
    locate: Callable[[int, int], list[list[int]]],
    *,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Return a training set with the locations of one's own choice, with its collator.

    Args:
        locate: from the number of an example and the length of its prompt to `[interventions][positions]`.
    """
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        if isinstance(texts, str):
            raise ReftError(f"expected a list of texts, got one text, {reprlib.repr(texts)}.", setting=name)
    if len(inputs) != len(outputs) or not len(inputs):
        raise ReftError(f"Expected as many answers as prompts, at least one, got {len(inputs)} and {len(outputs)}.")
    if tokenizer.pad_token_id is None:
        raise ReftError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token first.")
    columns: dict[str, list] = {"input_ids": [], "intervention_locations": [], "labels": []}
    told = False
    for number, (prompt, answer) in enumerate(zip(inputs, outputs, strict=True)):
        ids, length = encode_pair(tokenizer, prompt, answer, end=not nonstop, number=number)
        told = told or told_of_doubled_bos(tokenizer, ids, number)
        columns["input_ids"].append(ids)
        columns["intervention_locations"].append(locate(number, length))
        columns["labels"].append([IGNORED] * length + ids[length:])
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, label_pad_token_id=IGNORED, padding="longest")
    return {
        "train_dataset": Dataset.from_dict(columns),
        "eval_dataset": None,
        "data_collator": ReftDataCollator(data_collator=collator, shift=True),
    }
