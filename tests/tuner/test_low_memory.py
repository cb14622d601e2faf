"""`low_cpu_mem_usage`: parameters without values until those of a file take their place, by every door."""

import peft
import pytest
import torch
from accelerate import init_empty_weights
from peft.utils import load_peft_weights

import pyreft
from conftest import shaken, tiny_llama

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
INTERVENTIONS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"]
INTERVENTIONS += ["red", "bias", "reftr1", "road", "lofit", "jola", "lora"]


def config(**changes):
    return pyreft.ReftConfig(
        **{"intervention": "loreft", "layers": [1, 3], "positions": "l2", "low_rank_dimension": 4} | changes
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded_by_peft(base, directory, settings):
    return peft.PeftModel.from_pretrained(base, directory, low_cpu_mem_usage=True)


def loaded_by_pyreft(base, directory, settings):
    return pyreft.ReftModel.from_pretrained(base, directory, low_cpu_mem_usage=True)


def loaded_beside(base, directory, settings):
    model = peft.get_peft_model(base, config(layers=[2]))
    model.load_adapter(directory, "x", low_cpu_mem_usage=True)
    model.set_adapter("x")
    return model


def made_and_filled(base, directory, settings):
    model = peft.get_peft_model(base, config(**settings), low_cpu_mem_usage=True)
    assert_without_values(model, "reft_")
    peft.set_peft_model_state_dict(model, load_peft_weights(directory), low_cpu_mem_usage=True)
    return model


def injected_and_filled(base, directory, settings):
    model = peft.inject_adapter_in_model(config(**settings), base, low_cpu_mem_usage=True)
    assert_without_values(model, "reft_")
    state = {name.removeprefix("base_model.model."): value for name, value in load_peft_weights(directory).items()}
    peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    return model


def loaded_by_transformers(base, directory, settings):
    base.load_adapter(str(directory), low_cpu_mem_usage=True)
    return base


DOORS = [loaded_by_peft, loaded_by_pyreft, loaded_beside, made_and_filled, injected_and_filled, loaded_by_transformers]


def assert_without_values(model, part):
    assert {p.device.type for name, p in model.named_parameters() if part in name} == {"meta"}
    assert {p.device.type for name, p in model.named_parameters() if part not in name} == {"cpu"}


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"intervention": "nodireft"}])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_bit_exact(tmp_path, door, settings):
    adapted = shaken(peft.get_peft_model(tiny_llama(), config(**settings)))
    adapted.save_pretrained(tmp_path)
    again = door(tiny_llama(), tmp_path, settings)
    assert torch.equal(logits(again.eval()), logits(adapted))
    again.requires_grad_(True)
    again(input_ids=IDS, labels=IDS).loss.backward()
    edits = [p for name, p in again.named_parameters() if "reft_" in name and ("layers.2" not in name)]
    assert all(p.grad is not None and p.dtype == torch.float32 for p in edits)


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_every_intervention(tmp_path, intervention):
    places = {"layer": 1, "positions": "l2", "intervention": intervention}
    adapted = shaken(peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(representations=places)))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded_by_peft(tiny_llama(), tmp_path, {})), logits(adapted))


def test_a_bfloat16_base_keeps_an_adapter_in_float32(tmp_path):
    adapted = shaken(peft.get_peft_model(tiny_llama().to(torch.bfloat16), config()))
    adapted.save_pretrained(tmp_path)
    for door in (loaded_by_peft, loaded_by_pyreft, loaded_beside):
        again = door(tiny_llama().to(torch.bfloat16), tmp_path, {}).eval()
        assert {p.dtype for name, p in again.named_parameters() if "reft_" in name} == {torch.float32}
        assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize("low", [True, False])
def test_an_adapter_on_a_base_without_values_has_none(tmp_path, low):
    peft.get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    with init_empty_weights():
        base = tiny_llama()
    for make in (
        lambda: peft.get_peft_model(base, config(), low_cpu_mem_usage=low),
        lambda: peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low),
        lambda: pyreft.ReftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low),
        lambda: pyreft.get_reft_model(base, config()),
    ):
        model = make()
        assert {p.device.type for p in model.parameters()} == {"meta"}
        model.unload()


def test_a_ready_intervention_keeps_its_values():
    intervention = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4)
    places = {"layer": 1, "positions": "l2", "intervention": intervention}
    model = peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(representations=places), low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not torch.equal(logits(shaken(model)), logits(tiny_llama()))
