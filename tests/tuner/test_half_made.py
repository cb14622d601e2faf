"""An adapter that could not be made to its end, since memory ran out or somebody interrupted, is not there."""

import contextlib

import peft
import pytest
import torch

import pyreft
import pyreft.tuner.hooks as hooks
import pyreft.tuner.tuner as tuner
from conftest import shaken, tiny_llama
from pyreft.tuner import reft_layers
from pyreft.tuner.layer import ReftLayer


def config(**changes):
    places = {"layers": [1, 3], "positions": "f1+l2", "modules_to_save": ["lm_head"]}
    return pyreft.ReftConfig(**{"intervention": "loreft", "low_rank_dimension": 2} | places | changes)


IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
ERRORS = [RuntimeError("out of memory"), KeyboardInterrupt()]
BEGINNINGS = {
    "pyreft": pyreft.get_reft_model,
    "peft": peft.get_peft_model,
    "transformers": lambda base, made: base.add_adapter(made) or base,
}


@torch.no_grad()
def logits(model, **given):
    return model(input_ids=IDS, **given).logits


@contextlib.contextmanager
def failing(where, error):
    """Where its interventions are to be made, calls watched, a place or the second edited, or when all is made."""
    made, places = ReftLayer.add_intervention, []

    def add(layer, *args, **kwargs):
        places.append(layer)
        if len(places) == 2:
            raise error
        made(layer, *args, **kwargs)

    def stop(*_):
        raise error

    def attach(layer):
        layer.get_base_layer().add_module(f"reft_{layer.side}", layer)
        raise error

    target = {
        "start": (tuner, "make_interventions", stop),
        "watch": (hooks, "open_door", stop),
        "place": (ReftLayer, "attach", attach),
        "half": (ReftLayer, "add_intervention", add),
        "end": (tuner, "leave_inference", stop),
    }[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*target)
        with pytest.raises(type(error)):
            yield


@pytest.mark.parametrize("where", ["start", "place", "half", "end"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", ["add", "load"])
def test_a_further_one(way, error, where, tmp_path):
    """Added once more, it would have two interventions in the places that it had already."""
    other = shaken(pyreft.get_reft_model(tiny_llama(), config()))
    other.save_pretrained(tmp_path)
    model = shaken(pyreft.get_reft_model(tiny_llama(), config(layers=[0, 1]), adapter_name="a"))
    before = logits(model)
    with failing(where, error):
        model.add_adapter("b", config()) if way == "add" else model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), before)
    with pytest.raises(pyreft.ReftError, match="adapter_names: expected adapters of this model"):
        logits(model, adapter_names=["b", "a"])
    if way == "add":
        model.add_adapter("b", config())
    model.load_adapter(tmp_path, "b")
    assert torch.equal(logits(model), before)
    assert {len(layer["b"]) for layer in reft_layers(model) if "b" in layer} == {1}
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("where", ["start", "watch", "place", "half", "end"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("library", BEGINNINGS)
def test_the_first_one(library, error, where):
    base = tiny_llama()
    names, before = [name for name, _ in base.named_modules()], logits(base)
    with failing(where, error):
        BEGINNINGS[library](base, config())
    assert [name for name, _ in base.named_modules()] == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert torch.equal(logits(base), before)
    given = {"prompt_lengths": torch.tensor([4, 6])}
    found = []
    for one in (base, tiny_llama()):
        torch.manual_seed(1)
        found.append(logits(shaken(BEGINNINGS[library](one, config())), **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_one_whose_weights_were_being_read(error, tmp_path, monkeypatch):
    shaken(pyreft.get_reft_model(tiny_llama(), config())).save_pretrained(tmp_path)
    base, model = tiny_llama(), shaken(pyreft.get_reft_model(tiny_llama(), config(), adapter_name="a"))
    before = logits(model)

    def stop(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.set_peft_model_state_dict", stop)
        for load in (
            lambda: pyreft.ReftModel.from_pretrained(base, tmp_path),
            lambda: model.load_adapter(tmp_path, "b"),
        ):
            with pytest.raises(type(error)):
                load()
    assert not any("reft_" in name or "modules_to_save" in name for name, _ in base.named_modules())
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("first", [None, "a"])
@pytest.mark.parametrize(("name", "changes"), [("model", {}), ("b", {"layers": [9]})])
def test_one_that_is_refused(name, changes, first):
    """By transformers' `add_adapter`, which begins to keep it before it asks PEFT."""
    base, plain = tiny_llama(), {"modules_to_save": None}
    if first is not None:
        base.add_adapter(config(**plain), first)
    with pytest.raises(pyreft.ReftError):
        base.add_adapter(config(**plain | changes), name)
    assert list(getattr(base, "peft_config", {})) == [first] * (first is not None)
    base.add_adapter(config(**plain), "c")
    assert base.active_adapters() == ["c"]


@pytest.mark.parametrize("where", ["start", "half", "end"])
@pytest.mark.parametrize("library", BEGINNINGS)
def test_what_it_was_made_of_serves_the_next(library, where):
    """The modules that a config is given, which it lets go of to a model, and the shape of this model."""
    given = [pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=2) for _ in range(2)]
    places = [{"layer": layer, "intervention": one} for layer, one in zip((1, 3), given, strict=True)]
    made = pyreft.ReftConfig(representations=places)
    with failing(where, ERRORS[0]):
        BEGINNINGS[library](tiny_llama(), made)
    model = BEGINNINGS[library](tiny_llama(num_hidden_layers=5), made)  # such as a smaller one, after all
    assert [layer["default"][0] for layer in reft_layers(model)] == given


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", ["load_adapter", "load_intervention"])
def test_one_that_was_being_overwritten(way, error, tmp_path, monkeypatch):
    """Its parameters are all old or all new."""
    other = shaken(pyreft.get_reft_model(tiny_llama(), config()))
    other.save_pretrained(tmp_path)
    model = pyreft.get_reft_model(tiny_llama(), config())
    torch.manual_seed(1)
    before, written, seen = logits(shaken(model)), torch.nn.Module._load_from_state_dict, []

    def write(module, *args):
        written(module, *args)
        seen.extend([module] * isinstance(module, pyreft.LoreftIntervention))
        if len(seen) == 2:  # what the first is made of has been loaded
            raise error

    load = {"load_adapter": lambda: model.load_adapter(tmp_path, "default")}.get(
        way, lambda: model.load_intervention(tmp_path)
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "_load_from_state_dict", write)
        with pytest.raises(type(error)):
            load()
    assert torch.equal(logits(model), before)
    load()
    assert torch.equal(logits(model), logits(other))
