"""Calls as programs for the original make them: by position, without locations, with those of each beam."""

import numpy as np
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(5))
BASE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LAST = {"sources->base": (None, [[[7], [7]]] * 2)}


def config(**changes):
    places = [{"layer": layer, "component": "block_output", "low_rank_dimension": 4} for layer in (1, 3)]
    interventions = [pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4) for _ in places]
    return pyreft.ReftConfig(
        representations=[
            {**place, "intervention": intervention, **changes}
            for place, intervention in zip(places, interventions, strict=True)
        ]
    )


@pytest.fixture
def adapted(model):
    return shaken(pyreft.get_reft_model(model, config()))


def test_arguments_by_position(adapted):
    expected = adapted(BASE, unit_locations=LAST, labels=IDS, output_original_output=True)
    for found in (
        adapted(BASE, None, LAST, None, None, IDS, True),
        adapted.forward(BASE, [None], LAST, None, None, IDS, True, None, None, None),
        adapted(BASE, None, LAST, labels=IDS, output_original_output=True),
        adapted(base=BASE, sources=None, unit_locations=LAST, labels=IDS, output_original_output=True),
    ):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.logits, other.logits)
            assert torch.equal(one.loss, other.loss)
    base, tokens = adapted.generate(BASE, None, LAST, None, True, None, True, **OPTIONS)
    by_name = {"unit_locations": LAST, "intervene_on_prompt": True, "output_original_output": True}
    for one, other in zip((base, tokens), adapted.generate(BASE, **by_name, **OPTIONS), strict=True):
        assert torch.equal(one, other)


def test_an_answer_by_name(adapted):
    base, edited = adapted(BASE, unit_locations=LAST, output_original_output=True)
    found = adapted(BASE, None, LAST, None, None, None, True, True)
    assert torch.equal(found.original_outputs.logits, base.logits)
    assert torch.equal(found.intervened_outputs.logits, edited.logits)
    assert found.collected_activations is None


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((BASE, None, LAST), {"unit_locations": LAST}, "unit_locations: given by position and by name"),
        ((BASE, *[None] * 10), {}, "Expected at most 10 arguments by position .*, got 11"),
        ((BASE, [BASE]), {}, "sources: ReFT learns its edits"),
        ((BASE,), {"source_representations": {"a": 1}}, "sources: ReFT learns its edits"),
        ((BASE,), {"intervention_additional_kwargs": {"s": 1}}, "intervention_additional_kwargs: the interventions"),
    ],
)
def test_what_has_no_use_is_told(adapted, args, kwargs, message):
    with pytest.raises(pyreft.ReftError, match=message):
        adapted(*args, **kwargs)


@pytest.mark.parametrize("given", [{}, {"unit_locations": None}])
def test_without_locations_all_tokens_are_edited(adapted, given):
    _, found = adapted(BASE, **given)
    _, expected = adapted(BASE, unit_locations={"base": list(range(8))})
    assert torch.equal(found.logits, expected.logits)
    everywhere = pyreft.get_reft_model(tiny_llama(), config(positions="all")).eval()
    everywhere.load_state_dict(adapted.state_dict())
    assert torch.equal(everywhere(**BASE).logits, expected.logits)
    _, tokens = adapted.generate(BASE, **given, intervene_on_prompt=True, **OPTIONS)
    assert torch.equal(tokens, everywhere.generate(**BASE, **OPTIONS))  # those that are generated, too
    _, prompt = adapted.generate(BASE, unit_locations={"base": list(range(8))}, **OPTIONS)
    assert not torch.equal(tokens, prompt)
    for unsaid in ({}, {"intervene_on_prompt": False}):
        with pytest.raises(pyreft.ReftError, match="or that all are, those that are generated, too"):
            adapted.generate(BASE, **given, **unsaid, **OPTIONS)


def test_none_for_one_intervention_is_all_of_its_tokens(adapted):
    _, found = adapted(BASE, unit_locations={"sources->base": (None, [None, [[7], [7]]])})
    every = [list(range(8))] * 2
    _, expected = adapted(BASE, unit_locations={"sources->base": (None, [every, [[7], [7]]])})
    assert torch.equal(found.logits, expected.logits)


def test_with_a_rule_no_locations_are_needed(model):
    adapted = shaken(pyreft.get_reft_model(model, config(positions="l2")))
    _, found = adapted(BASE)
    assert torch.equal(found.logits, adapted(**BASE).logits)
    _, tokens = adapted.generate(BASE, unit_locations=None, intervene_on_prompt=True, **OPTIONS)
    assert torch.equal(tokens, adapted.generate(**BASE, **OPTIONS))


@pytest.mark.parametrize(
    "given",
    [
        {"base": 7},
        {"base": [7]},
        {"sources->base": 7},
        {"sources->base": (None, 7)},
        {"sources->base": [None, [[[7], [7]]] * 2]},
        {"sources->base": (None, torch.full((2, 2, 1), 7))},
        {"sources->base": (None, [torch.tensor([[7], [7]])] * 2)},
        {"sources->base": (None, np.full((2, 2, 1), 7))},
        {"sources->base": ([[[0], [0]]] * 2, [[[7], [7]]] * 2)},
        {"sources->base": (None, [[[7]]] * 2)},  # a prompt that is repeated, for several answers to it
        [[[7], [7]], [[7], [7]]],
    ],
)
def test_every_form_of_the_locations(adapted, given):
    _, expected = adapted(BASE, unit_locations=LAST)
    assert torch.equal(adapted(BASE, unit_locations=given)[1].logits, expected.logits)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}])
def test_locations_of_each_beam(adapted, options):
    rows = torch.tensor([[[6, 7], [5, 7]]] * 2)
    once = {"sources->base": (None, rows.tolist())}
    repeated = {"sources->base": (None, rows.repeat_interleave(4, dim=1).tolist())}
    directions = {"sources->base": (None, [[[0], [1, 2]]] * 2)}
    of_beams = {"sources->base": (None, [[[0]] * 4 + [[1, 2]] * 4] * 2)}
    for one, other in ((None, None), (directions, of_beams)):
        _, expected = adapted.generate(BASE, unit_locations=once, subspaces=one, **options, **OPTIONS)
        _, found = adapted.generate(BASE, unit_locations=repeated, subspaces=other, **options, **OPTIONS)
        assert torch.equal(found, expected)
    wrong = {"sources->base": (None, rows.repeat(1, 4, 1).tolist())}  # rows one after the other, four times
    with pytest.raises(pyreft.ReftError, match=r"so \[2\]\[2\]\[positions\]; got \[2\]\[8\]\[2\]"):
        adapted.generate(BASE, unit_locations=wrong, **options, **OPTIONS)
    with pytest.raises(pyreft.ReftError, match=r"got \[2\]\[8\]\[2\]"):
        adapted(BASE, unit_locations=repeated)


def test_subspaces_for_all_rows_and_for_classes_of_ones_own(adapted):
    _, expected = adapted(BASE, unit_locations=LAST, subspaces=[[[0, 2]] * 2] * 2)
    assert torch.equal(adapted(BASE, unit_locations=LAST, subspaces=[0, 2])[1].logits, expected.logits)
    _, expected = adapted(BASE, unit_locations=LAST)
    found = adapted(BASE, unit_locations=LAST, subspaces=[{"idx": torch.tensor([0])}] * 2)[1]
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("given", ["a", ["a"], [[1, 2]], b"a"])
def test_what_is_no_tensor_of_tokens_is_refused(adapted, given):
    calls = [
        lambda: adapted.generate(given),
        lambda: adapted.generate(inputs=given),
        lambda: adapted.generate({"input_ids": given}, intervene_on_prompt=True),
        lambda: adapted({"input_ids": given}),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"expected the tokens of the inputs as a tensor, .* got (str|list|bytes)"):
            call()
