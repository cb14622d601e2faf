"""Configs as programs for the original write them."""

import copy
from collections import namedtuple
from types import SimpleNamespace

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(5))
FIELDS = "layer component unit max_number_of_units low_rank_dimension intervention_type intervention subspace_partition"
RepresentationConfig = namedtuple("RepresentationConfig", FIELDS, defaults=(0, "block_output", "pos", 1, *[None] * 4))


def loreft(rank=4):
    return pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=rank)


def test_the_module_decides_its_rank():
    place = {"layer": 2, "component": "block_output", "low_rank_dimension": 2, "intervention": loreft(4)}
    with pytest.warns(
        UserWarning, match="low_rank_dimension is 2 beside an intervention made with 4, which is the one"
    ):
        config = pyreft.ReftConfig(representations=[place])
    assert config.representations[0].low_rank_dimension == 4
    assert pyreft.get_reft_model(tiny_llama(), config).count_parameters() == 2 * 32 * 4 + 4


def test_the_path_decides_its_layer():
    """Programs that count layers from 1 write it so."""
    place = {"layer": 3, "component": "model.layers[2].output", "intervention": loreft()}
    with pytest.warns(
        UserWarning, match=r"layer is 3 beside the path 'model.layers\[2\].output', which is what counts"
    ):
        config = pyreft.ReftConfig(representations=[place])
    adapted = pyreft.get_reft_model(tiny_llama(), config)
    assert adapted.sorted_keys == ["comp_model_layers[2]_output_unit_pos_nunit_1#0"]
    assert hasattr(adapted.model.model.layers[2], "reft_output")


@pytest.mark.parametrize("disable", [True, False])
def test_a_lora_beneath_is_frozen_with_the_model(disable):
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted = pyreft.get_reft_model(
        lora, {"layer": 2, "positions": "l1", "intervention": loreft()}, disable_model_grads=disable
    )
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trained) is not disable
    assert any("reft_" in name for name in trained)


@pytest.mark.parametrize(
    ("places", "further", "expected"),
    [
        ([{"layer": 2, "intervention_type": pyreft.DireftIntervention}], {}, ["direft"]),
        ([{"layer": 1}, {"layer": 2}], {"intervention_types": pyreft.NoreftIntervention}, ["noreft", "noreft"]),
        ([{"layer": 1}, {"layer": 2}], {"intervention_types": ["loreft", "direft"]}, ["loreft", "direft"]),
        ([{"layer": 1, "intervention": "direft"}], {"intervention_types": ["loreft"]}, ["direft"]),
        ([RepresentationConfig(2, intervention_type=pyreft.ConsreftIntervention)], {}, ["consreft"]),
        ([{"layer": 1, "intervention_type": None}], {"model_type": "LlamaForCausalLM"}, ["loreft"]),
    ],
)
def test_classes_by_the_originals_names(places, further, expected):
    config = pyreft.ReftConfig(representations=places, low_rank_dimension=4, **further)
    assert [entry.intervention for entry in config.representations] == expected
    assert pyreft.ReftConfig(**config.to_dict()).representations == config.representations


@pytest.mark.parametrize("make", [pyreft.get_reft_model, pyreft.ReftModel])
@pytest.mark.parametrize(
    "given",
    [
        lambda module: {"layer": 2, "intervention": module},
        lambda module: [{"layer": 2, "intervention": module}],
        lambda module: SimpleNamespace(
            representations=[RepresentationConfig(2, intervention=module)], intervention_types=[type(module)]
        ),
    ],
    ids=["a dict", "a list", "pyvene's"],
)
def test_whatever_the_original_takes_as_a_config(make, given):
    module = loreft()
    adapted = make(tiny_llama(), given(module))
    assert list(adapted.interventions.values()) == [module]
    assert adapted.representations.keys() == {"layer_2_comp_block_output_unit_pos_nunit_1#0"}


def test_another_method_is_refused():
    for make in (pyreft.get_reft_model, pyreft.ReftModel):
        with pytest.raises(pyreft.ReftError, match="reft_config: expected a ReftConfig, got LoraConfig"):
            make(tiny_llama(), peft.LoraConfig())


def test_one_module_in_two_adapters_is_refused():
    module = loreft()
    place = {"layer": 2, "positions": "l2", "intervention": module}
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=place), adapter_name="first")
    with pytest.raises(pyreft.ReftError, match=r"intervention: this LoreftIntervention is that of the adapter 'first'"):
        adapted.add_adapter("second", pyreft.ReftConfig(representations={**place, "layer": 1}))
    assert list(adapted.peft_config) == ["first"]
    adapted.add_adapter("second", pyreft.ReftConfig(representations={**place, "intervention": copy.deepcopy(module)}))
    adapted.delete_adapter("first")  # whose module is free then
    adapted.add_adapter("third", pyreft.ReftConfig(representations=place))
    assert next(adapted.get_submodule("base_model.model.model.layers.2.reft_output.third").children()) is module


def test_one_module_in_two_layers(tmp_path, capsys):
    module = loreft()
    places = [{"layer": layer, "positions": "l2", "intervention": module} for layer in (1, 2)]
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=places)))
    assert adapted.count_parameters() == 2 * (2 * 32 * 4 + 4)
    assert len(adapted.get_trainable_parameters()) == 3
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable intervention params: 260 || trainable model params: 0\n")
    with torch.no_grad():
        expected = adapted(IDS).logits
    adapted.save(tmp_path)
    loaded = pyreft.ReftModel.load(tmp_path, tiny_llama())  # as two modules, like the original
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)
    for model in (adapted.train(), loaded.train()):
        model(input_ids=IDS, labels=IDS).loss.backward()
    first, second = loaded.interventions.values()
    for one, other, both in zip(first.parameters(), second.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one.grad + other.grad, both.grad)
