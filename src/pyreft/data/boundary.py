"""Where a prompt ends and its answer begins, in tokens: the prompt's as `generate` sees them, then those of the answer.

A text of both may be tokenized in another way at the border, where one token can reach from one into the other.
Knows tokenizers and texts, nothing of formats.
"""

import warnings

from transformers import PreTrainedTokenizerBase

from ..files.text import check_characters

_BEFORE = ("\n", ":", "a")  # texts that an answer may be tokenized behind, so that no space is put before it


class Chat(str):
    """A text in a chat template, which writes the special tokens by itself: a tokenizer adds none to it."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text; a `Chat`, or one that begins with the BOS token, gets no special tokens beside its own.

    Raises:
        ReftError: half a character.
    """
    check_characters(text, "prompt")
    return tokenizer(text, add_special_tokens=not _has_specials(tokenizer, text))["input_ids"]


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, doubled: bool = False
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, and those of the answer behind it, which spell it.

    Args:
        doubled: let the tokenizer add a BOS token to a prompt that begins with one, as the tokenizer does by itself.
    """
    specials = doubled or not _has_specials(tokenizer, prompt)
    before = tokenizer(prompt, add_special_tokens=specials)["input_ids"]
    said = prompt.rstrip()  # of an empty one, the last token may be a BOS token that is the same
    if said and before[-1:] == [tokenizer.eos_token_id] and not said.endswith(str(tokenizer.eos_token)):
        warnings.warn(
            f"The tokenizer puts {tokenizer.eos_token!r} behind every text, so it stands between each prompt and its "
            'answer, and is the last token of the prompt: tokenizer.add_eos_token = False, or "add_eos_token": false '
            "in tokenizer_config.json, leaves it out.",
            UserWarning,
            stacklevel=2,
        )
    both = tokenizer(prompt + answer, add_special_tokens=specials)["input_ids"]
    if both[: len(before)] == before and len(both) > len(before) and not _unknown_at_border(tokenizer, before, answer):
        return before, both[len(before) :]
    return before, _behind(tokenizer, before, answer)


def _unknown_at_border(tokenizer: PreTrainedTokenizerBase, before: list[int], answer: str) -> bool:
    """Whether prompt and answer meet in unknown letters: some tokenizers make one unknown token of all of these."""
    if before[-1:] != [tokenizer.unk_token_id]:
        return False
    said = (token for token in _plain(tokenizer, answer) if _decoded(tokenizer, [token]).strip())
    return next(said, None) == tokenizer.unk_token_id


def _behind(tokenizer: PreTrainedTokenizerBase, before: list[int], answer: str) -> list[int]:
    """The tokens of an answer alone, such that what stands before them and they are decoded to prompt and answer."""
    alone = _plain(tokenizer, answer)
    spelled = _decoded(tokenizer, before)
    for text in ("", *_BEFORE):
        ahead, ids = _plain(tokenizer, text) if text else [], _plain(tokenizer, text + answer)
        if ids[: len(ahead)] == ahead and _decoded(tokenizer, before + ids[len(ahead) :]) == spelled + answer:
            return ids[len(ahead) :]
    return alone


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _has_specials(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return isinstance(text, Chat) or (bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token))
