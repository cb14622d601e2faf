"""The members of the original's model: interventions by its keys, and a model made in its order of arguments."""

import pytest
import torch
from torch import nn

import pyreft
from conftest import shaken, tiny_llama
from pyreft.files.original import legacy_keys

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(5))


def config(layers=(1, 3), **changes):
    places = [{"layer": layer, "component": "block_output", "low_rank_dimension": 4} for layer in layers]
    interventions = [pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4) for _ in places]
    given = zip(places, interventions, strict=True)
    return pyreft.ReftConfig(representations=[{**place, "intervention": module, **changes} for place, module in given])


def test_interventions_by_the_originals_keys(model):
    given = config()
    modules = [entry.intervention for entry in given.representations]
    adapted = pyreft.get_reft_model(model, given)
    keys = ["layer_1_comp_block_output_unit_pos_nunit_1#0", "layer_3_comp_block_output_unit_pos_nunit_1#0"]
    assert isinstance(adapted.interventions, nn.ModuleDict)
    assert list(adapted.interventions) == adapted.sorted_keys == list(adapted.representations) == keys
    assert [id(module) for module in adapted.interventions.values()] == [id(module) for module in modules]
    assert [entry.layer for entry in adapted.representations.values()] == [1, 3]
    assert adapted.representations[keys[1]].low_rank_dimension == 4
    assert adapted.model_config is model.config
    adapted.train()
    adapted.interventions.eval()
    assert not any(module.training for module in modules)
    assert adapted.training
    assert {name for name, _ in adapted.interventions.named_parameters()} == {
        f"{key}.{name}" for key in keys for name, _ in modules[0].named_parameters()
    }


@pytest.mark.parametrize(
    "places",
    [
        {"layers": "all", "positions": "f1+l1", "share_weights": False},
        {"layers": [2, 0], "component": "mlp_output"},
        {"representations": {"component": "model.layers[2].mlp.output"}},
        {"representations": [{"layer": 1}, {"layer": 1}, {"layer": 1, "component": "mlp_input"}]},
        {"representations": [{"layer": 1, "component": "head_query_output", "head": n} for n in (0, 1)]},
    ],
)
def test_each_intervention_has_a_key_of_its_own(model, places):
    adapted = pyreft.get_reft_model(
        model, pyreft.ReftConfig(**{"intervention": "loreft", "low_rank_dimension": 2} | places)
    )
    expected = adapted.peft_config["default"].expand(4)
    assert list(adapted.interventions) == legacy_keys(expected)
    assert len(set(adapted.interventions.values())) == len(expected)
    adapted.add_adapter("other", pyreft.ReftConfig(layers=[0], intervention="loreft"))
    adapted.set_adapter("other")
    assert list(adapted.interventions) == ["layer_0_comp_block_output_unit_pos_nunit_1#0"]


class Asked(pyreft.ReftModel):
    """As programs for the original subclass it."""

    def __init__(self, reft_config, model, tokenizer):
        super().__init__(reft_config, model)
        self.tokenizer = tokenizer

    def generate(self, base, **kwargs):
        last = base["input_ids"].shape[1] - 1
        locations = {"sources->base": (None, [[[last]] * len(base["input_ids"])] * 2)}
        return super().generate(base, unit_locations=locations, intervene_on_prompt=True, **kwargs)[1]


def test_a_model_made_in_the_originals_order():
    adapted = shaken(Asked(config(), tiny_llama(), "a tokenizer"))
    adapted.disable_model_gradients()
    expected = pyreft.ReftModel(tiny_llama(), config(positions="l1")).eval()
    expected.load_state_dict(adapted.state_dict())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(adapted.generate({"input_ids": IDS}, **options), expected.generate(IDS, **options))
    assert adapted.tokenizer == "a tokenizer"
    assert {p.requires_grad for p in adapted.model.model.embed_tokens.parameters()} == {False}
