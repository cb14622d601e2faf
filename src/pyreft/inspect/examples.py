"""What an adapter is looked at on: prompts, or prompts with their answers, as rows of token ids.

A row is a dict with `input_ids` and, where there is an answer, `labels` that are -100 on the prompt. Knows nothing of
edits but which tokens a position rule chooses.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..data.encode import default_format, encode, prompt_text, token_ids
from ..data.fields import Format
from ..data.files import read_examples, read_prompts
from ..errors import ReftError
from ..positions import IGNORED, Positions, prompt_tokens

Row = dict[str, list[int]]


def text_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | tuple[str, str]], form: Format | None = None
) -> list[Row]:
    """Return prompts as rows, written in a format; by default in that which the tokenizer suggests.

    Args:
        texts: prompts, each alone or as a pair with its further input.
    """
    pairs = [(text, "") if isinstance(text, str) else text for text in texts]
    form = form or default_format(tokenizer)
    written = [prompt_text(tokenizer, prompt, form, given) for prompt, given in pairs]
    return [{"input_ids": token_ids(tokenizer, text)} for text in written]


def read_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, form: Format | None = None, *, most: int | None = None
) -> list[Row]:
    """Return the rows of a file: prompts from a `.txt`, prompts with answers from `.jsonl`, `.json` or `.csv`.

    Args:
        form: how prompts are written; by default as the data or the tokenizer suggests.
        most: take the first so many rows.

    Raises:
        ReftError: a file that cannot be read (see `pyreft.data.files`), or a row that is too long.
    """
    if Path(path).suffix.lower() == ".txt":
        return text_rows(tokenizer, read_prompts(path)[:most], form)
    examples = read_examples(path)[:most]
    form = form or default_format(tokenizer, examples)
    return [encode(tokenizer, example, form, tokenizer.model_max_length) for example in examples]


def prompt_length(row: Row) -> int:
    """How many tokens of a row are its prompt: all of them where it has no answer."""
    return int(prompt_tokens(*_masks(row))[0].sum())


def edited_tokens(rules: Sequence[Positions | None], row: Row) -> Tensor:
    """Which tokens of a row the rules of an adapter choose together, `[tokens]`."""
    tokens, labels = _masks(row)
    prompt, ids = prompt_tokens(tokens, labels), torch.tensor([row["input_ids"]])
    chosen = [tokens if rule.endless else rule.locate(prompt, ids) for rule in rules if rule is not None]
    return torch.stack(chosen).any(0)[0] if chosen else torch.zeros_like(tokens[0])


def check_edited(rules: Sequence[Positions | None], rows: Sequence[Row]) -> None:
    """Refuse rows of which an adapter edits no token.

    Raises:
        ReftError: an adapter without rules, no rows, or the first row without an edited token.
    """
    if not rows:
        raise ReftError("There is no text to look at; give at least one.")
    if not any(rules):
        raise ReftError(
            "The adapter has no position rule: which tokens it edits comes with each call, so a text alone does not "
            "say it. Make it with ReftConfig(positions=...) to look at it."
        )
    for number, row in enumerate(rows, 1):
        if not bool(edited_tokens(rules, row).any()):
            raise ReftError(
                f"Text {number} has no edited token: of its {len(row['input_ids'])} tokens, the position rule chooses "
                "none. Leave it out, or give a text to which the rule applies."
            )


def batches(rows: Sequence[Row], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield the rows padded on the right, with their masks, and with labels if one of them has an answer."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = [torch.tensor(row["input_ids"]) for row in part]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if any("labels" in row for row in part):
            labels = [torch.tensor(row.get("labels", [IGNORED] * len(row["input_ids"]))) for row in part]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _masks(row: Row) -> tuple[Tensor, Tensor | None]:
    tokens = torch.ones(1, len(row["input_ids"]), dtype=torch.bool)
    return tokens, torch.tensor([row["labels"]]) if "labels" in row else None
