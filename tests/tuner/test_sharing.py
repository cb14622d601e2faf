"""One base model and two PEFT models: kept apart, or refused, whatever door the second comes by."""

import copy

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
SHARED = "This base model carries the edits of a model made before"
GONE = "This model's edits were taken off its base model"


def config(**changes):
    return pyreft.ReftConfig(
        **{"intervention": "loreft", "layers": [1, 3], "positions": "l2", "low_rank_dimension": 4} | changes
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def saved(tmp_path):
    shaken(peft.get_peft_model(tiny_llama(), config())).save_pretrained(tmp_path)
    return tmp_path


def by_peft(base, saved):
    return peft.get_peft_model(base, config())


def by_peft_with_a_task(base, saved):
    return peft.get_peft_model(base, config(task_type="CAUSAL_LM"))


def by_peft_with_another_name(base, saved):
    return peft.get_peft_model(base, config(), "another")


def from_a_directory(base, saved):
    return peft.PeftModel.from_pretrained(base, saved)


def by_pyreft(base, saved):
    return pyreft.get_reft_model(base, config())


def loaded_by_pyreft(base, saved):
    return pyreft.ReftModel.load(saved, base)


def by_injection(base, saved):
    return peft.inject_adapter_in_model(config(), base, "another")


def by_transformers(base, saved):
    base.add_adapter(config(), "another")
    return base


def by_transformers_from_a_directory(base, saved):
    base.load_adapter(str(saved), "another")
    return base


FIRST = [by_peft, by_peft_with_a_task, from_a_directory, by_pyreft, loaded_by_pyreft]
SECOND = [by_peft, by_peft_with_a_task, by_peft_with_another_name, from_a_directory]
SECOND += [by_injection, by_transformers, by_transformers_from_a_directory]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_a_second_model_is_refused_and_the_first_is_as_it_was(saved, first, second):
    base = tiny_llama()
    adapted = shaken(first(base, saved))
    before, configs, state = logits(adapted), dict(adapted.peft_config), copy.deepcopy(adapted.state_dict())
    with pytest.raises(pyreft.ReftError, match=SHARED):
        second(base, saved)
    assert torch.equal(logits(adapted), before)
    assert adapted.peft_config == configs
    assert adapted.state_dict().keys() == state.keys()
    adapted.add_adapter("b", config())  # as the message says
    assert torch.equal(logits(adapted), before)
    second(adapted.unload(), saved)


@pytest.mark.parametrize("second", SECOND[:4])
def test_a_model_around_one_that_has_edits_itself_is_refused(saved, second):
    base = tiny_llama()
    base.add_adapter(config(), "first")
    before = logits(shaken(base))
    with pytest.raises(pyreft.ReftError, match=rf"{SHARED} \(first\)"):
        second(base, saved)
    assert torch.equal(logits(base), before)
    base.add_adapter(config(), "second")
    assert set(base.peft_config) == {"first", "second"}


def test_an_adapter_of_the_same_name_is_refused():
    base = peft.inject_adapter_in_model(config(), tiny_llama(), "first")
    before = logits(shaken(base))
    with pytest.raises(pyreft.ReftError, match="adapter_name: the model has an adapter 'first'"):
        peft.inject_adapter_in_model(config(), base, "first")
    assert torch.equal(logits(base), before)
    peft.inject_adapter_in_model(config(), base, "second")


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", [by_pyreft, loaded_by_pyreft])
def test_a_model_whose_edits_were_released_says_so(saved, tmp_path, first, second):
    base = tiny_llama()
    released = shaken(first(base, saved))
    adapted = shaken(second(base, saved))
    before = logits(adapted)
    for use in (
        lambda: released(input_ids=IDS),
        lambda: released.base_model(input_ids=IDS),
        lambda: released.generate(input_ids=IDS, max_new_tokens=1),
        lambda: released.save_pretrained(tmp_path / "released"),
        lambda: released.load_adapter(saved, "default"),
        lambda: released.load_adapter(saved, "another"),
        lambda: released.add_adapter("another", config()),
        lambda: released.set_adapter("default"),
        lambda: released.delete_adapter("default"),
        released.unload,
    ):
        with pytest.raises(pyreft.ReftError, match=GONE):
            use()
    assert torch.equal(logits(adapted), before)


def test_after_unload_everything_may_be_done_again(saved):
    base, plain = tiny_llama(), logits(tiny_llama())
    adapted = shaken(peft.get_peft_model(base, config()))
    expected = logits(adapted)
    state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    for make in (*FIRST, *SECOND[:4]):
        assert adapted.unload() is base
        assert torch.equal(logits(base), plain)
        assert not hasattr(base, "peft_config")
        with pytest.raises(pyreft.ReftError, match=GONE):
            adapted(input_ids=IDS)
        adapted = make(base, saved)
        peft.set_peft_model_state_dict(adapted, state, adapted.active_adapter)
        assert torch.equal(logits(adapted.eval()), expected)


def test_after_transformers_the_same():
    base = tiny_llama()
    base.add_adapter(config(), "first")
    adapted = pyreft.get_reft_model(base, config())
    assert adapted.unload() is base
    base.add_adapter(config(), "first")
    assert base.active_adapters() == ["first"]


def test_a_model_with_edits_is_no_base_model(saved):
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), config()))
    before = logits(adapted)
    for make in (by_pyreft, loaded_by_pyreft):
        with pytest.raises(
            pyreft.ReftError, match=r"model: expected a base model, got a ReftModel .*get_base_model\(\)"
        ):
            make(adapted, saved)
    with pytest.raises(pyreft.ReftError, match=SHARED):
        by_peft(adapted, saved)
    assert torch.equal(logits(adapted), before)


def test_copies_are_apart():
    adapted = shaken(peft.get_peft_model(tiny_llama(), config()))
    before = logits(adapted)
    twin = copy.deepcopy(adapted)
    shaken(twin)
    assert torch.equal(logits(adapted), before)
    other = peft.get_peft_model(twin.unload(), config())
    shaken(other)
    assert torch.equal(logits(adapted), before)
