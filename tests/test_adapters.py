"""Several adapters in one model: weights exchanged in place, adapters that go, and what is refused."""

import itertools
import re

import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SEEDS = itertools.count(1)
PLACES = {"intervention": "loreft", "layers": [1, 2], "positions": "f1+l2", "low_rank_dimension": 4}


def adapt(**config):
    base = tiny_llama()
    torch.manual_seed(next(SEEDS))
    return shaken(pyreft.get_reft_model(base, pyreft.ReftConfig(**PLACES | config)))


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 9))


@pytest.mark.parametrize("intervention", ["loreft", "nodireft", "consreft"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_weights_are_swapped_in_place(ids, tmp_path, intervention, mode):
    adapted, other = adapt(intervention=intervention), adapt(intervention=intervention)
    other.save(tmp_path)
    with mode():  # both have now computed their rotations
        before, expected = adapted(ids).logits, other(ids).logits
        tokens = other.generate(input_ids=ids, **GREEDY)
    parameters = [(parameter, parameter.data_ptr()) for parameter in adapted.parameters()]
    adapted.load_intervention(tmp_path)
    for (parameter, place), now in zip(parameters, adapted.parameters(), strict=True):
        assert parameter is now
        assert parameter.data_ptr() == place
    with mode():
        assert torch.equal(adapted(ids).logits, expected)
        assert torch.equal(adapted.generate(input_ids=ids, **GREEDY), tokens)
    assert not torch.equal(before, expected)


def test_one_of_several_is_swapped(ids, tmp_path):
    other = adapt()
    other.save(tmp_path)
    adapted = adapt()
    adapted.add_adapter("second", pyreft.ReftConfig(**PLACES))
    shaken(adapted)
    first = adapted(ids).logits
    adapted.load_intervention(tmp_path, adapter_name="second")
    assert torch.equal(adapted(ids).logits, first)
    adapted.set_adapter("second")
    assert torch.equal(adapted(ids).logits, other(ids).logits)
    for name in ("sceond", "__base__"):
        with pytest.raises(
            pyreft.ReftError, match=r"adapter_name: expected adapters of this model \(default, second\)"
        ):
            adapted.load_intervention(tmp_path, adapter_name=name)


def test_other_places_are_not_swapped_in(ids, tmp_path):
    adapt(layers=[1, 3]).save(tmp_path)
    adapted = adapt()
    before = adapted(ids).logits
    with pytest.raises(pyreft.ReftError, match="expected the edits of this model"):
        adapted.load_intervention(tmp_path)
    assert torch.equal(adapted(ids).logits, before)


@pytest.mark.slow
def test_a_compiled_model_goes_on_with_swapped_weights(ids, tmp_path):
    adapted, other = adapt(), adapt()
    other.save(tmp_path)
    compiled = torch.compile(adapted, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids).logits, adapted(ids).logits)
        adapted.load_intervention(tmp_path)
        assert torch.equal(compiled(input_ids=ids).logits, other(ids).logits)


def test_what_was_computed_for_inference_can_be_differentiated_through(ids):
    adapted = adapt()
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    embeddings = adapted.get_input_embeddings()(ids)
    with torch.inference_mode():
        expected = adapted(inputs_embeds=embeddings).logits
    wanted = embeddings.detach().requires_grad_()
    logits = adapted(inputs_embeds=wanted).logits
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert wanted.grad.abs().sum() > 0


def test_a_weighted_adapter_is_refused_and_active_ones_are_weighted(ids):
    adapted = adapt()
    adapted.add_adapter("second", pyreft.ReftConfig(**PLACES))
    message = "model.base_model.set_adapter(['a', 'b']), and weight each with model.set_strength('a', 0.7)"
    with pytest.raises(pyreft.ReftError, match=re.escape(message)):
        adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert list(adapted.peft_config) == ["default", "second"]


def test_a_model_of_transformers_deletes_an_adapter(ids):
    model = tiny_llama()
    plain = model(ids).logits
    model.add_adapter(pyreft.ReftConfig(**PLACES), adapter_name="first")
    shaken(model)
    first = model(ids).logits
    model.add_adapter(pyreft.ReftConfig(**PLACES | {"layers": [3]}), adapter_name="second")
    shaken(model)
    assert not torch.equal(model(ids).logits, first)
    model.delete_adapter("second")
    assert model.active_adapters() == ["first"]
    model.set_adapter("first")
    assert not any(".second." in name for name, _ in model.named_parameters())
    model.delete_adapter(["first"])
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.delete_adapter("first")
    model.add_adapter(pyreft.ReftConfig(**PLACES), adapter_name="first")  # the name is free again
    shaken(model)
    assert not torch.equal(model(ids).logits, plain)


def test_a_deleted_adapter_is_gone(ids):
    adapted = adapt()
    first = adapted(ids).logits
    adapted.add_adapter("second", pyreft.ReftConfig(**PLACES | {"layers": [2, 3]}))
    adapted.delete_adapter("second")
    assert not any("second" in name for name, _ in adapted.named_parameters())
    assert torch.equal(adapted(ids).logits, first)
    assert adapted.active_adapters == ["default"]
    with pytest.raises(pyreft.ReftError, match=re.escape("expected adapters of this model (default) or '__base__'")):
        adapted(ids, adapter_names=["second", "default"])
    adapted.add_adapter("second", pyreft.ReftConfig(**PLACES | {"layers": [3]}))  # the name is free again
    adapted.delete_adapter("default")
    assert adapted.active_adapters == ["second"]
    shaken(adapted)
    assert not torch.equal(adapted(ids).logits, tiny_llama()(ids).logits)
