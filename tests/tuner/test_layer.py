"""An edited place among the modules of a model: walks over them find what they find without it."""

import peft
import pytest

import pyreft
from conftest import tiny_llama
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
