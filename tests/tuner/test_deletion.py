"""Deleting adapters: which are active then, with which trained heads, by every door; LoRA beside it."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import pyreft

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
NAMES = ("b", "a", "c")  # not in the order of the alphabet, by which PEFT chooses


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=96, pad_token_id=0, num_labels=3, **sizes)).eval()


def reft(head=True):
    saved = ["score"] if head else None
    return pyreft.ReftConfig(
        layers=[0, 1], positions="l2", low_rank_dimension=4, modules_to_save=saved, intervention="loreft"
    )


def lora(head=True):
    saved = ["score"] if head else None
    return peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)


def shaken(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("reft_", "lora_", "modules_to_save")):
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def wrapped(config, heads=(True, True, True)):
    first, *others = zip(NAMES, heads, strict=True)
    model = peft.get_peft_model(classifier(), config(first[1]), first[0])
    for name, head in others:
        model.add_adapter(name, config(head))
    return shaken(model)


def injected(config, heads=(True, True, True)):
    model = classifier()
    for name, head in zip(NAMES, heads, strict=True):
        peft.inject_adapter_in_model(config(head), model, name)
    model._hf_peft_config_loaded = True  # as transformers' add_adapter, which cannot add a second head by itself
    return shaken(model)


def switch(model, names):
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(names)
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.set_adapter([name for name in names if name in module.modules_to_save])


def logits(model):
    tuner = getattr(model, "base_model", None)  # a PeftModel is not told what is deleted from its tuner
    with torch.no_grad():
        return (tuner if isinstance(model, peft.PeftModel) else model)(input_ids=IDS).logits


def trained(model):
    """The parameters that are trained, by adapter."""
    return {
        name for name in NAMES if any(p.requires_grad and f".{name}." in path for path, p in model.named_parameters())
    }


def active_in(model):
    """The active adapters, of which all edited places must be at one."""
    kinds = (pyreft.tuner.layer.ReftLayer, peft.tuners.lora.LoraLayer)
    (active,) = {tuple(module.active_adapters) for module in model.modules() if isinstance(module, kinds)}
    return list(active)


DOORS = {
    "PeftModel": (wrapped, lambda model, name: model.delete_adapter(name)),
    "tuner": (wrapped, lambda model, name: model.base_model.delete_adapter(name)),
    "transformers": (injected, lambda model, name: model.delete_adapter(name)),
    "transformers, a list": (injected, lambda model, name: model.delete_adapter([name])),
}
ORDERS = [["b"], ["b", "a"], ["a", "b"], ["c"]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("door", DOORS)
def test_the_trained_head_goes_with_its_edits(door, order):
    make, delete = DOORS[door]
    answers = {}
    for name in NAMES:
        model = make(reft)
        switch(model, [name])
        answers[name] = logits(model)
    model, other = make(reft), make(lora)
    for each in (model, other):
        switch(each, ["b"])
        for name in order:
            delete(each, name)
    active = active_in(model)
    assert active == active_in(other)
    assert torch.equal(logits(model), answers[active[0]])
    assert trained(model) == trained(other) == set(active)
    assert not any(f".{gone}." in path for gone in order for path, _ in model.named_parameters())


@pytest.mark.parametrize(("deleted", "left"), [("b", ["a"]), ("a", ["b"]), ("c", ["b", "a"])])
@pytest.mark.parametrize("heads", [(True, False, True), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("door", DOORS)
def test_one_of_several_active_adapters(door, heads, deleted, left):
    make, delete = DOORS[door]
    model, expected = make(reft, heads), make(reft, heads)
    switch(model, ["b", "a"])
    switch(expected, left)
    delete(model, deleted)
    assert active_in(model) == left
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_without_a_head_hands_over_to_one_with(door):
    make, delete = DOORS[door]
    model, expected = make(reft, (False, True, False)), make(reft, (False, True, False))
    switch(model, ["b"])
    switch(expected, ["a"])
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted. Setting active adapter to a."):
        delete(model, "b")
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("door", DOORS)
def test_the_last_adapter_leaves_the_base_model(door):
    make, delete = DOORS[door]
    model = make(reft)
    for name in NAMES:
        delete(model, name)
    assert active_in(model) == []
    assert trained(model) == set()
    assert torch.equal(logits(model), logits(classifier()))


def test_an_unknown_name_deletes_nothing():
    model = injected(reft)
    before = logits(model)
    with pytest.raises(ValueError, match="not present and cannot be deleted: d"):
        model.delete_adapter(["b", "d"])
    assert torch.equal(logits(model), before)
    assert set(model.peft_config) == set(NAMES)
    adapted = wrapped(reft)
    for each in (adapted, adapted.base_model):
        with pytest.raises(ValueError, match="Adapter d does not exist"):
            each.delete_adapter("d")


def test_a_frozen_adapter_stays_frozen_when_another_goes():
    model = wrapped(reft)
    model.set_adapter("b", inference_mode=True)
    before = logits(model)
    model.delete_adapter("a")
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert trained(model) == set()
