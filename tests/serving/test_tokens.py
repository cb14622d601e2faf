"""From rules and windows to flat indices: against the masks of `Positions.locate`."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreft.errors import ReftError
from pyreft.positions import Positions, register_rule
from pyreft.serving.tokens import Place, Row, plan, rule_spans, same

counts = st.integers(0, 9)
rules = st.one_of(
    st.sampled_from([Positions(whole="prompt"), Positions(whole="all")]),
    st.tuples(counts, counts).filter(any).map(lambda n: Positions(first=n[0], last=n[1])),
    st.sampled_from([part for n in (1, 3, 8) for part in Positions(first=n, last=4).sides()]),
)
HERE = Place(2, 0)
PATTERN = same({HERE: 0})


def located(rule, prompt, tokens):
    """The mask of the rule, `[tokens]`, those generated included."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[:prompt] = rule.locate(torch.ones(1, prompt, dtype=torch.bool))[0]
    if rule.whole == "all":
        mask[prompt:] = True
    return mask


@given(rules, st.integers(1, 25))
def test_spans_are_the_located_tokens_and_do_not_touch(rule, prompt):
    found = np.zeros(prompt + 5, dtype=int)
    spans = rule_spans(rule, prompt)
    for a, b in spans:
        found[a:b] += 1
    assert found.tolist() == located(rule, prompt, prompt + 5).int().tolist()
    assert all(one[1] < two[0] for one, two in pairwise(spans))


def test_a_rule_of_ones_own_has_no_spans():
    register_rule("every_other", lambda prompt, ids: prompt)
    with pytest.raises(ReftError, match="'every_other' of your own cannot be served"):
        rule_spans(Positions.parse("every_other"), 4)


@given(st.data())
def test_chunks_edit_each_located_token_once_with_its_own_slot(data):
    requests = data.draw(st.lists(st.tuples(rules, st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=5))
    rows = {
        number: Row(slot, PATTERN, (rule,), prompt) for number, (rule, prompt, slot) in enumerate(requests) if slot < 3
    }
    done = [0] * len(requests)
    seen = [torch.zeros(prompt + 4, dtype=torch.int) for _, prompt, _ in requests]
    while any(n < len(tokens) for n, tokens in zip(done, seen, strict=True)):
        chunk = [data.draw(st.integers(0, len(tokens) - n)) for n, tokens in zip(done, seen, strict=True)]
        if not any(chunk):
            chunk = [len(tokens) - n for n, tokens in zip(done, seen, strict=True)]
        starts = np.cumsum([0, *chunk]).tolist()
        step = plan(rows, starts, done)
        tokens = None if step is None else step.at(HERE)
        for tile in [] if tokens is None else tokens.tiles(width=3):
            assert tile.strength is None
            valid = torch.ones_like(tile.at, dtype=torch.bool) if tile.valid is None else tile.valid
            slots = torch.arange(9)[tile.slots] if isinstance(tile.slots, slice) else tile.slots
            for slot, line in zip(
                slots.tolist(), [at[ok].tolist() for at, ok in zip(tile.at, valid, strict=True)], strict=True
            ):
                for flat in line:
                    row = int(np.searchsorted(starts, flat, side="right")) - 1
                    assert requests[row][2] == slot
                    seen[row][done[row] + flat - starts[row]] += 1
        done = [n + m for n, m in zip(done, chunk, strict=True)]
    for tokens, (rule, prompt, slot) in zip(seen, requests, strict=True):
        assert tokens.tolist() == (located(rule, prompt, prompt + 4).int() * (slot < 3)).tolist()


def test_nothing_is_planned_while_rules_of_the_prompt_generate():
    rows = {n: Row(n, PATTERN, (Positions.parse(rule),), 8) for n, rule in enumerate(("l16", "f3+l3", "prompt"))}
    assert plan(rows, [0, 1, 2, 3], [8, 9, 30]) is None
    rows[3] = Row(3, PATTERN, (Positions.parse("all"),), 8)
    step = plan(rows, [0, 1, 2, 3, 4], [8, 9, 30, 11])
    assert step is not None
    assert step.at(HERE).at.tolist() == [3]


def test_a_last_chunk_of_one_token_is_edited():
    rows = {0: Row(5, PATTERN, (Positions.parse("l1"),), 65)}
    assert plan(rows, [0, 64], [0]).at(HERE) is None
    found = plan(rows, [0, 1], [64]).at(HERE)
    assert (found.at.tolist(), found.slots.tolist()) == ([0], [5])


def test_places_share_their_tokens_where_the_rules_are_alike_and_not_where_they_differ():
    one, two = Place(0, 0), Place(1, 0)
    alike, apart, alone = same({one: 0, two: 0}), same({one: 0, two: 1}), same({two: 0})
    assert same({two: 0, one: 0}) is alike
    f1, l1 = Positions.parse("f1"), Positions.parse("l1")
    step = plan({0: Row(0, alike, (f1,), 4), 1: Row(1, alike, (l1,), 4)}, [0, 4, 8], [0, 0])
    assert step.at(one) is step.at(two)
    assert step.at(one).at.tolist() == [0, 7]
    step = plan({0: Row(0, apart, (f1, l1), 4), 1: Row(1, alone, (f1,), 4)}, [0, 4, 8], [0, 0])
    assert step.at(one).at.tolist() == [0]
    assert step.at(two).at.tolist() == [3, 4]
    assert step.at(Place(7, 0)) is None


def test_a_row_may_have_left_and_strengths_stay_with_their_tokens():
    rows = {n: Row(0, PATTERN, (Positions.parse("l2"),), 4, strength) for n, strength in enumerate((1.0, 0.5, 1.0))}
    (tile,) = plan(rows, [0, 4, 8], [0, 0]).at(HERE).tiles()  # the third row computes nothing now
    assert tile.at.tolist() == [[2, 3, 6, 7]]
    assert tile.strength.flatten().tolist() == [1, 1, 0.5, 0.5]
