"""An edited place among the modules of a model: walks over them find what they find without it."""

import peft
import pytest
import torch

import pyreft
from conftest import tiny_llama
from pyreft.interventions import Intervention, OrthonormalColumns, orthonormalize
from pyreft.tuner.layer import ReftLayer

PLACES = ["block_output", "mlp_output", "model.layers[1].mlp.down_proj.output", "model.layers[1].input_layernorm.input"]


@pytest.mark.parametrize("component", PLACES)
def test_a_walk_over_all_modules(component):
    def weights(model):
        return [id(module.weight) for module in model.modules() if hasattr(module, "weight")]

    base = tiny_llama()
    before = weights(base)
    layer = {} if "." in component else {"layer": 1}
    place = {"component": component, "positions": "l2", "intervention": "bias", **layer}
    model = peft.get_peft_model(base, pyreft.ReftConfig(representations=place))
    assert weights(model) == before
    (found,) = (module for module in model.modules() if isinstance(module, ReftLayer))
    for name in ("weight", "bias"):
        assert not hasattr(found, name)
        assert getattr(found, name, None) is None
        with pytest.raises(AttributeError, match=name):
            getattr(found, name)
    path = next(path for path, module in model.named_modules() if module is found).rpartition(".")[0]
    assert found.get_base_layer() is model.get_submodule(path)


def test_parameters_that_fsdp_has_flattened_are_computed_in_their_block():
    """Before it, they are parts of themselves, of one dimension."""
    model = peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(layers=[1, 2], positions="l1", intervention="loreft"))
    rotations = [module for module in model.modules() if isinstance(module, OrthonormalColumns)]
    rotations[0].free._fsdp_flattened = True  # as `FullyShardedDataParallel` notes it
    assert list(orthonormalize(rotations)) == rotations[1:]


@pytest.mark.parametrize("formula", ["loreft", "lora"])
def test_parts_of_an_edit_that_fsdp_has_wrapped_are_refused(formula):
    config = pyreft.ReftConfig(layers=[1], positions="l1", intervention=formula, low_rank_dimension=2)
    model = peft.get_peft_model(tiny_llama(), config)
    (intervention, *_) = (module for module in model.modules() if isinstance(module, Intervention))
    for name, part in [*intervention.named_children()]:
        if hasattr(part, "weight"):
            setattr(intervention, name, torch.nn.ModuleDict({"_fsdp_wrapped_module": part}))
    with pytest.raises(pyreft.ReftError, match=r"FSDP has wrapped parts of an edit.*Use version 2"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_the_status_names_the_method():
    model = peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(layers=[1], intervention="loreft"))
    model.add_adapter("second", pyreft.ReftConfig(layers=[2], intervention="loreft"))
    status = model.get_model_status()
    assert status.peft_types == {"default": "REFT", "second": "REFT"}
    assert status.num_adapter_layers == 2
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert {entry.name for entry in model.get_layer_status()} == {
        "model.model.layers.1.reft_output",
        "model.model.layers.2.reft_output",
    }
