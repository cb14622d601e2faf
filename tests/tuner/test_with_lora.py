"""Edits on a model that has a LoRA: two sets of adapters, each switched, saved and taken off by itself."""

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def with_lora():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    lora = peft.get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return lora


def config():
    return pyreft.ReftConfig(layers=[1, 3], positions="l2", low_rank_dimension=4, intervention="loreft")


def by_pyreft(lora, name):
    return pyreft.get_reft_model(lora, config(), disable_model_grads=False, adapter_name=name)


def by_peft(lora, name):
    return peft.get_peft_model(lora, config(), name)


def on_the_base(lora, name):
    return pyreft.get_reft_model(lora.get_base_model(), config(), disable_model_grads=False, adapter_name=name)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["default", "edits"])
@pytest.mark.parametrize("make", [by_pyreft, by_peft, on_the_base])
def test_two_sets_kept_apart(make, name, tmp_path):
    lora = with_lora()
    before, configs = logits(lora), dict(lora.peft_config)
    trained = {path for path, p in lora.named_parameters() if p.requires_grad}
    adapted = shaken(make(lora, name))
    assert lora.peft_config == configs
    assert set(adapted.peft_config) == {name}
    assert {path for path, p in lora.named_parameters() if p.requires_grad and "reft_" not in path} == trained
    edited = logits(adapted)
    assert not torch.equal(edited, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), edited)

    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    adapted.delete_adapter("second")
    assert adapted.active_adapters == [name]
    assert torch.equal(logits(adapted), edited)
    assert {path for path, p in lora.named_parameters() if p.requires_grad and "reft_" not in path} == trained

    found = peft.get_peft_model_state_dict(adapted, adapter_name=name)
    assert not [key for key in found if "lora_" in key]
    assert [key for key in found if "reft_" in key]
    adapted.unload()
    assert lora.peft_config == configs
    assert torch.equal(logits(lora), before)
    assert {path for path, p in lora.named_parameters() if p.requires_grad} == trained
    again = make(lora, name).eval()
    peft.set_peft_model_state_dict(again, found, name)
    assert torch.equal(logits(again), edited)


def test_all_of_it_is_frozen_with_the_model():
    adapted = pyreft.get_reft_model(with_lora(), config())
    assert {path for path, p in adapted.named_parameters() if p.requires_grad and "reft_" not in path} == set()
    assert adapted.count_parameters() > 0


def test_each_is_saved_and_loaded_by_itself(tmp_path):
    lora = with_lora()
    adapted = shaken(by_pyreft(lora, "edits"))
    expected = logits(adapted)
    adapted.save(tmp_path)  # in a folder of its name
    lora.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert torch.equal(logits(pyreft.ReftModel.from_pretrained(again, tmp_path / "edits", "edits")), expected)
    other = with_lora()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    kept = {name: value.clone() for name, value in other.state_dict().items()}
    pyreft.ReftModel.from_pretrained(other, tmp_path / "edits", "edits")
    assert all(torch.equal(other.state_dict()[name], value) for name, value in kept.items())


def test_a_lora_that_comes_later_and_edits_that_go():
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), config()))
    base = adapted.get_base_model()
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, base, "later")
    assert adapted.unload() is base
    assert set(base.peft_config) == {"later"}
    assert not torch.equal(logits(base), logits(tiny_llama()))
