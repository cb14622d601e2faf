"""`peft.inject_adapter_in_model`, and what PEFT has for the tensors of a model that is adapted so."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyreft
from conftest import shaken, tiny_llama

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def config(**changes):
    places = {"layers": [1, 3], "positions": "f1+l2"}
    return pyreft.ReftConfig(**{"intervention": "loreft", "low_rank_dimension": 2} | places | changes)


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 9))


@pytest.fixture
def model():
    return shaken(peft.inject_adapter_in_model(config(), tiny_llama()))


@torch.no_grad()
def logits(model, ids, **given):
    return model(input_ids=ids, **given).logits


def test_the_edits_are_those_of_a_wrapped_model(model, ids):
    wrapped = pyreft.get_reft_model(tiny_llama(), config()).eval()
    state = peft.get_peft_model_state_dict(model)
    assert not torch.allclose(logits(model, ids), logits(tiny_llama(), ids), atol=1e-3)
    loaded = peft.set_peft_model_state_dict(wrapped, {f"base_model.model.{name}": one for name, one in state.items()})
    assert not loaded.unexpected_keys
    assert torch.equal(logits(wrapped, ids), logits(model, ids))
    given = {"prompt_lengths": torch.tensor([4, 6])}
    assert torch.equal(logits(wrapped, ids, **given), logits(model, ids, **given))
    assert torch.equal(wrapped.generate(input_ids=ids, **GREEDY), model.generate(input_ids=ids, **GREEDY))


@pytest.mark.parametrize("names", [["lm_heads"], ["lm_head", "scores"], ["classifier"]])
def test_a_module_to_train_that_is_not_there_is_refused(names):
    """PEFT passes over its name, and nothing would be trained beside the edits."""
    base, adapted = tiny_llama(), pyreft.get_reft_model(tiny_llama(), config())
    makes = (pyreft.get_reft_model, peft.get_peft_model, lambda base, config: adapted.add_adapter("b", config))
    for make in makes:
        with pytest.raises(pyreft.errors.ReftError, match=f"modules_to_save: .* which has no '{names[-1]}'"):
            make(base, config(modules_to_save=names))
    assert list(adapted.peft_config) == ["default"]
    assert not any("reft_" in name for name, _ in base.named_modules())


def test_its_tensors_go_into_another_one(model, ids):
    state = peft.get_peft_model_state_dict(model)
    assert {name.split(".reft_output")[0] for name in state} == {"model.layers.1", "model.layers.3"}
    again = peft.inject_adapter_in_model(config(), tiny_llama(), low_cpu_mem_usage=True, state_dict=state).eval()
    loaded = peft.set_peft_model_state_dict(again, state, low_cpu_mem_usage=True)
    assert not loaded.unexpected_keys
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(("layers", "got"), [([1], "model.layers.1"), ([1, 2], "model.layers.1, model.layers.2")])
def test_tensors_of_other_places_are_refused(ids, layers, got):
    state = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config(layers=layers), tiny_llama()))
    base = tiny_llama()
    expected = (
        rf"state_dict: expected tensors of the places that the config edits \(model.layers.1, .*got those of {got}\."
    )
    with pytest.raises(pyreft.ReftError, match=expected):
        peft.inject_adapter_in_model(config(), base, state_dict=state)
    assert not any("reft_" in name for name, _ in base.named_modules())
    assert torch.equal(logits(base, ids), logits(tiny_llama(), ids))


def test_a_step_trains_the_edits_alone(model, ids):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("reft_" in name for name in trained)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings(
    "ignore:While injecting the PEFT adapters:RuntimeWarning"
)  # by paths with _orig_mod. in them
def test_into_a_model_that_is_compiled(model, ids):
    state = peft.get_peft_model_state_dict(model)
    compiled = torch.compile(tiny_llama(), backend="aot_eager")
    peft.inject_adapter_in_model(config(), compiled, state_dict=state).eval()
    peft.set_peft_model_state_dict(compiled, {f"_orig_mod.{name}": tensor for name, tensor in state.items()})
    expected = logits(model, ids, use_cache=False)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), expected)


@pytest.mark.parametrize("change", ["missing", "more", "none"])
@pytest.mark.parametrize("door", ["from_pretrained", "a new name", "a name that is there", "set_peft_model_state_dict"])
def test_a_half_adapter_is_refused_at_the_doors_of_peft(tmp_path, door, change):
    """PEFT leaves the rest as it was made, at random."""
    config = {"layers": [1, 3], "positions": "l2", "intervention": "loreft", "low_rank_dimension": 2}
    peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(**config)).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    last = max(tensors)
    if change == "more":
        tensors[last.replace("layers.3", "layers.2")] = tensors[last].clone()
    tensors = {} if change == "none" else {n: t for n, t in tensors.items() if n != last or change == "more"}
    save_file(tensors, weights, metadata={"format": "pt"})
    model = peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(**config))
    doors = {
        "from_pretrained": lambda: peft.PeftModel.from_pretrained(tiny_llama(), tmp_path),
        "a new name": lambda: model.load_adapter(tmp_path, "another"),
        "a name that is there": lambda: model.load_adapter(tmp_path, "default"),
        "set_peft_model_state_dict": lambda: peft.set_peft_model_state_dict(model, tensors),
    }
    what = {"missing": f"got 5: {last} is missing", "more": "got 7: .*layers.2.* is not known", "none": "got 0: "}
    with pytest.raises(pyreft.ReftError, match=f"expected the 6 tensors of the adapter's edits, {what[change]}"):
        doors[door]()
