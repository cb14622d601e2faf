"""Text as it comes: together it is the text of all tokens, and no stop is in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyreft.loading import load_tokenizer
from pyreft.serving.laptop.writing import Writer

TOKENIZER = load_tokenizer(None)
TEXT = "A whale is big 🐋🌊, naïve and “quoted”."


def write(ids, stop=()):
    writer = Writer(TOKENIZER, stop)
    parts = []
    for token in ids:
        parts.append(writer.add(token))
        if writer.stopped:
            break
    return [*parts, writer.end()], writer


@given(st.lists(st.integers(0, 2047), max_size=30))
def test_parts_are_the_text_of_all_tokens(ids):
    parts, _ = write(ids)
    assert "".join(parts) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_no_part_of_a_character_is_told():
    ids = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    parts, _ = write(ids)
    assert "".join(parts) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > 8


@pytest.mark.parametrize("stop", ["whale", "e is b", "le i", "A", ".", "🐋🌊", "🌊"])
def test_a_stop_ends_it_wherever_tokens_end(stop):
    ids = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    parts, writer = write(ids, ("never there", stop))
    assert "".join(parts) == whole[: whole.index(stop)]
    assert writer.stopped


def test_what_only_begins_like_a_stop_is_told_in_the_end():
    ids = TOKENIZER("A whale", add_special_tokens=False)["input_ids"]
    parts, writer = write(ids, ("whales", "le."))
    assert "".join(parts) == "A whale"
    assert not writer.stopped
