import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyreft
from conftest import pad, shaken, tiny_llama
from pyreft.errors import ReftError
from pyreft.positions import Positions, prompt_tokens, register_rule


def located(rule, length, side=None):
    """The located tokens of one prompt without padding."""
    parsed = Positions.parse(rule)
    part = next((p for p in parsed.sides() if p.side == side), parsed)
    return part.locate(torch.ones(1, length, dtype=torch.bool))[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("rule", "length", "expected"),
    [
        ("f2", 5, [0, 1]),
        ("l2", 5, [3, 4]),
        ("f2+l1", 5, [0, 1, 4]),
        ("F2 + L1", 5, [0, 1, 4]),
        ("prompt", 3, [0, 1, 2]),
        ("all", 3, [0, 1, 2]),
        ("l1", 1, [0]),
        ("f7", 3, [0, 1, 2]),
        ("l7", 3, [0, 1, 2]),
        ("f7+l7", 5, [0, 1, 3, 4]),  # each side at most half
        ("f7+l7", 1, []),
        ("f0+l3", 5, [2, 3, 4]),
    ],
)
def test_located_tokens(rule, length, expected):
    assert located(rule, length) == expected


def test_prefix_and_suffix_apart():
    assert located("f2+l3", 9, "prefix") == [0, 1]
    assert located("f2+l3", 9, "suffix") == [6, 7, 8]
    assert Positions.parse("l3").sides() == (Positions(last=3),)


@given(
    rule=st.sampled_from(["f1", "f3", "l1", "l4", "f2+l2", "f7+l7", "prompt", "all"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 4),
)
def test_padding_changes_nothing(rule, lengths, side, extra):
    width = max(lengths) + extra
    columns = torch.arange(width)[None]
    sizes = torch.tensor(lengths)[:, None]
    tokens = columns >= width - sizes if side == "left" else columns < sizes
    mask = Positions.parse(rule).locate(tokens)
    for row, length in enumerate(lengths):
        shift = width - length if side == "left" else 0
        assert (mask[row].nonzero()[:, 0] - shift).tolist() == located(rule, length)


def test_where_the_prompt_ends():
    tokens = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, 5, -100, 6, -100]])
    assert prompt_tokens(tokens, labels).tolist() == [[False, True, True, False, False], [True] + [False] * 4]
    lengths = torch.tensor([1, 3])  # goes before the labels
    assert prompt_tokens(tokens, labels, lengths).int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert torch.equal(prompt_tokens(tokens), tokens)
    no_loss, all_loss = torch.full_like(labels, -100), torch.full_like(labels, 5)
    assert torch.equal(prompt_tokens(tokens, no_loss), tokens)
    assert torch.equal(prompt_tokens(tokens, all_loss), tokens)


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        ("last", "l1"),
        ("last3", "l3"),
        ("first2", "f2"),
        ("l2+f1", "f1+l2"),
        ("16", "l16"),
        ("4", "l4"),
        ("promt", "prompt"),
    ],
)
def test_unknown_rule(rule, near):
    with pytest.raises(ReftError) as caught:
        Positions.parse(rule)
    message = f"positions: expected f<n>, l<n>, f<n>+l<m>, prompt or all, got {rule!r}. Did you mean {near!r}?"
    assert str(caught.value) == message


@pytest.mark.parametrize("rule", ["", "f", "f0", "l0", "f0+l0", "0", "x3", None])
def test_rules_that_name_nothing(rule):
    with pytest.raises(ReftError, match="positions: expected"):
        Positions.parse(rule)


# -- rules of one's own -------------------------------------------------------------------------------------------


def every_other(prompt, input_ids):
    return prompt & (prompt.cumsum(-1) % 2 == 1)


def of_token_5(prompt, input_ids):
    return input_ids == 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rule_of_ones_own_is_a_function(model, prompts, side, tmp_path):
    adapted = shaken(
        pyreft.get_reft_model(
            model, pyreft.ReftConfig(positions=every_other, low_rank_dimension=4, intervention="loreft")
        )
    )
    assert adapted.peft_config["default"].positions == "every_other"
    ids, mask = pad(prompts, side)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, **options)[:, -5:]
    for row, prompt in enumerate(prompts):
        places = [[list(range(0, len(prompt), 2))] * 4]
        alone = adapted.generate(input_ids=torch.tensor([prompt]), intervention_locations=places, **options)
        assert torch.equal(alone[0, -5:], tokens[row])
    adapted.save(tmp_path)
    again = pyreft.ReftModel.load(tmp_path, tiny_llama())
    assert torch.equal(again(ids, attention_mask=mask).logits, adapted(ids, attention_mask=mask).logits)


def test_a_rule_sees_the_ids(model):
    adapted = shaken(
        pyreft.get_reft_model(model, pyreft.ReftConfig(positions=of_token_5, layers=[1], intervention="loreft"))
    )
    ids = torch.tensor([[3, 5, 7, 5], [9, 9, 9, 5]])
    states = adapted(ids, output_hidden_states=True).hidden_states[2]
    with adapted.disable_adapter():
        before = adapted(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal((states != before).any(-1), ids == 5)


def test_a_rule_that_nobody_gave():
    with pytest.raises(ReftError, match=r"A rule of your own is made known by pyreft.positions.register_rule"):
        pyreft.ReftConfig(positions="every_third", intervention="loreft")


@pytest.mark.parametrize("name", ["l1", "prompt", "all", "f2l3", "<lambda>", "two words"])
def test_a_rule_of_ones_own_needs_a_plain_name(name):
    with pytest.raises(ReftError, match=f"needs a plain name that is not f<n>.*got {name!r}"):
        register_rule(name, lambda prompt, input_ids: prompt)


@pytest.mark.parametrize(
    ("made", "came"),
    [
        (lambda prompt, input_ids: prompt.long(), r"got \[2, 3\] of torch.int64"),
        (lambda prompt, input_ids: prompt[:1], r"got \[1, 3\] of torch.bool"),
        (lambda prompt, input_ids: [0], r"got \[0\]"),
    ],
)
def test_a_rule_of_ones_own_returns_a_mask(made, came):
    register_rule("unusual", made)
    with pytest.raises(ReftError, match=f"the rule 'unusual' must return a bool mask .*{came}"):
        Positions.parse("unusual").locate(torch.ones(2, 3, dtype=torch.bool))


def test_a_rule_of_ones_own_stays_within_the_prompt():
    register_rule("everywhere", lambda prompt, input_ids: torch.ones_like(prompt))
    prompt = torch.tensor([[True, True, False]])
    assert torch.equal(Positions.parse("everywhere").locate(prompt), prompt)
