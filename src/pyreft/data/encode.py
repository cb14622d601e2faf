"""From examples to token ids: how a prompt is written for a model, and where its answer begins.

Three formats: `text` is the prompt as it stands, `chat` the tokenizer's chat template around it, `alpaca` the
instruction template of the Alpaca data set.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ReftError, did_you_mean
from ..positions import IGNORED
from .boundary import pair_ids, token_ids
from .fields import FORMATS, Example, Format, alpaca_prompt
from .tally import LongRows, Tally
from .templates import chat_text, chat_texts, check_bare, unread_fields
from .turns import is_blank

__all__ = [
    "chat_text",
    "context_length",
    "default_format",
    "encode",
    "encode_all",
    "prompt_text",
    "token_ids",
    "token_texts",
]


def default_format(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] = ()) -> Format:
    """The format that examples have by themselves; plain prompts become a chat if the tokenizer has a template."""
    if examples and examples[0].format != "text":
        return examples[0].format
    return "chat" if tokenizer.chat_template else "text"


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, form: Format, given: str = "") -> str:
    """Return what the model reads before it answers a prompt of one turn; `given` is an instruction's input.

    Raises:
        ReftError: another format, which the file of an adapter may name; or a prompt that is in the template already.
    """
    if form not in FORMATS:
        raise ReftError(f"expected {', '.join(FORMATS)}, got {form!r}.{did_you_mean(form, FORMATS)}", setting="format")
    if form == "alpaca":
        return alpaca_prompt(prompt, given)
    text = f"{prompt}\n\n{given}" if given else prompt
    if form == "text":
        return text
    written = chat_text(tokenizer, [{"role": "user", "content": text}])
    check_bare(text, written)
    return written


def texts(tokenizer: PreTrainedTokenizerBase, example: Example, form: Format) -> tuple[str, str]:
    """Return what the model reads before an answer, and the answer.

    Raises:
        ReftError: a chat that does not fit the format or its template.
    """
    if form == "chat":
        return chat_texts(tokenizer, example)
    if example.extras or len(example.messages) != 2 or example.messages[-1].keys() - {"role", "content"}:
        more = ", ".join(example.extras) or f"{len(example.messages)} turns"
        raise ReftError(f"{example.where}: a chat with {more} cannot be written as {form!r}; use 'chat'.",
                        setting="format")  # fmt: skip
    return prompt_text(tokenizer, example.messages[0]["content"], form, example.given), example.completion


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, form: Format, limit: int, long_rows: LongRows = "refuse"
) -> dict[str, Any]:
    """Return `input_ids` and `labels`, which are -100 on the prompt; the answer ends with EOS, once.

    Args:
        limit: the most tokens that the model takes.
        long_rows: what becomes of a row with more: it is refused, or its prompt is cut from the left; with `skip` it
            is returned as long as it is.

    Raises:
        ReftError: no EOS token, a template that does not take the chat, or a row that is too long.
    """
    return _row(tokenizer, example, texts(tokenizer, example, form), limit, long_rows)[0]


def _row(
    tokenizer: PreTrainedTokenizerBase, example: Example, written: tuple[str, str], limit: int, long_rows: LongRows
) -> tuple[dict[str, Any], bool]:
    """A row of a prompt and its answer, and whether it is or was longer than the limit."""
    if not tokenizer.eos_token:
        raise ReftError("The tokenizer has no EOS token, so an answer would never end: set tokenizer.eos_token.")
    before, answer = pair_ids(tokenizer, *written)
    end = tokenizer.eos_token_id
    while answer[-1:] == [end]:  # of the text, of a template, or of both
        answer = answer[:-1]
    if not answer:
        raise ReftError(f"{example.where}: the answer is {tokenizer.eos_token!r} alone, there is nothing to learn.")
    answer = [*answer, end]
    long = len(before) + len(answer) > limit
    if long and long_rows != "skip":
        before = _cut(tokenizer, example, before, answer, limit, long_rows)
    return {"input_ids": before + answer, "labels": [IGNORED] * len(before) + answer}, long


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    before: list[int],
    answer: list[int],
    limit: int,
    long_rows: LongRows,
) -> list[int]:
    """A prompt without its beginning, but with its BOS token, so that it and the answer fit."""
    first = before[:1] if before[:1] == [tokenizer.bos_token_id] else []
    room = limit - len(answer) - len(first)
    if long_rows == "cut" and room > 0:
        return first + before[-room:]
    hint = "shorten it" if long_rows == "cut" else "shorten it, or give `long_rows` cut or skip"
    if len(before) >= limit and long_rows != "cut":
        raise ReftError(f"{example.where}: the prompt has {len(before)} tokens, the context {limit}; {hint}.",
                        also=["long_rows"])  # fmt: skip
    raise ReftError(
        f"{example.where}: prompt and answer have {len(before) + len(answer)} tokens ({len(before)} and "
        f"{len(answer)}), the context {limit}; {hint}.",
        also=["long_rows"],
    )


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    form: Format,
    limit: int,
    *,
    long_rows: LongRows = "refuse",
    tally: Tally | None = None,
    least: int = 0,
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Return examples, without those that are left out, and their rows; see `encode`.

    Args:
        tally: is told of rows that are wrong, cut or left out.
        least: how many tokens a prompt needs, see `Positions.least`.

    Raises:
        ReftError: the rows that are wrong, all told at once; or none is left.
    """
    tally = tally or Tally(rows=len(examples))
    kept, rows, unread = [], [], set()
    if form == "chat" and not tokenizer.chat_template:
        raise ReftError("The tokenizer has no chat template; give prompts as they stand, with the format 'text'.")
    for example in examples:
        with tally.watch(example.row or example.where):
            written = texts(tokenizer, example, form)
            if form == "chat":
                found = unread_fields(tokenizer, example.messages, "".join(written))
                unread |= {(name, example.row or example.where) for name in found}
            row, long = _row(tokenizer, example, written, limit, long_rows)
            if (count := row["labels"].count(IGNORED)) < least:
                raise ReftError(
                    f"{example.where}: the prompt has {count or 'no'} token, and none would be edited; leave the "
                    "row out, or give other `positions`.",
                    also=["positions"],
                )
            if least and _asks_nothing(example):
                raise ReftError(
                    f"{example.where}: the prompt is empty, there is nothing of it to edit; leave the row out, or give "
                    "`positions` all.",
                    also=["positions"],
                )
            if long and long_rows == "skip":
                tally.skipped += 1
                continue
            tally.cut += long
            kept.append(example)
            rows.append(row)
    tally.unread |= Counter(f"{name} of a turn" for name, _ in sorted(unread))
    tally.check()
    if examples and not rows and tally.errors:
        raise ReftError(f"no row is right:\n{tally.listed()}", also=tally.also)
    if examples and not rows:
        raise ReftError(
            f"no row is left of {len(examples):,}; the longest may have {limit} tokens.", setting="max_length"
        )
    return kept, rows


def _asks_nothing(example: Example) -> bool:
    before = example.messages[:-1]
    return (
        not example.extras
        and is_blank(example.given)
        and all(is_blank(t["content"]) and not t.get("tool_calls") for t in before)
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return each token as text; a fragment of a character, which is no text by itself, as the vocabulary has it."""
    texts = [tokenizer.decode([token]) for token in ids]
    names: Any = tokenizer.convert_ids_to_tokens(list(ids))
    return [str(name) if "\ufffd" in text or not text else text for text, name in zip(texts, names, strict=True)]


def context_length(model: Any, tokenizer: PreTrainedTokenizerBase, asked: int | None = None) -> int:
    """The most tokens that a model and its tokenizer take, or fewer if asked for."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    most = min(own, tokenizer.model_max_length)
    if asked is not None and not 1 < asked <= most:
        raise ReftError(f"expected 2 to {most}, the context of the model, got {asked}.", setting="max_length")
    return asked or most
