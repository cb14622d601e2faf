"""What an adapter's directory tells without its model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyreft
from commands import run
from pyreft import pocket
from pyreft.describe import describe, located_tokens
from pyreft.interventions import INTERVENTIONS


def ends_of_sentences(prompt, input_ids):
    """A rule that looks at the ids."""
    return input_ids == pocket.load()[1]("?", add_special_tokens=False)["input_ids"][-1]


def test_the_tokens_of_a_rule_of_ones_own(tmp_path):
    config = pyreft.ReftConfig(
        layers=1, positions=ends_of_sentences, low_rank_dimension=2, prompt_format="text", intervention="loreft"
    )
    pyreft.get_reft_model(pocket.load()[0], config).save(tmp_path)
    (tokens,) = located_tokens(tmp_path, "Why? Where?").values()
    assert [token["token"].strip() for token in tokens if token["edited"]] == ["?", "?"]


PLACES = [
    {"layer": 1, "component": "head_value_output", "head": 1, "positions": "l1", "low_rank_dimension": 2},
    {"layer": 1, "component": "mlp_activation", "positions": "l1", "low_rank_dimension": 4},
    {"component": "model.layers[5].self_attn.q_proj.output", "positions": "l4", "intervention": "red"},
]


@pytest.mark.parametrize(
    "settings", [{}, {"representations": PLACES}, *({"intervention": n, "positions": "f2+l2"} for n in INTERVENTIONS)]
)
def test_what_was_saved_fits(tmp_path, settings):
    config = pyreft.ReftConfig(**settings)
    model = pyreft.get_reft_model(pocket.load()[0], config)
    model.save(tmp_path)
    assert describe(tmp_path)["parameters"] == sum(p.numel() for p in model.interventions.parameters())


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"low_rank_dimension": 8},
            {},
            r"layers.1.reft_output.0 has learned_source.bias \[4\], .* no loreft of rank 8, ",
        ),
        ({"intervention": "nodireft"}, {}, "which is no nodireft of rank 4, and 1 more"),
        ({"intervention": "red", "low_rank_dimension": None}, {}, "which is no red, and 1 more"),
        ({"layers": [1]}, {}, "layers.3.reft_output.0 is no place of it"),
        ({"layers": [1, 3, 4]}, {}, "nothing of the block_output of layer 4 is there"),
        ({"positions": "f2+l2", "share_weights": False}, {}, "it has tensors of 2 places, the config names 4"),
        ({"component": "mlp_output"}, {}, "nothing of the mlp_output of layer 1 is there, and 3 more"),
        ({"component": "block_input"}, {}, "nothing of the block_input of layer 1 is there, and 3 more"),
        ({"modules_to_save": ["score"]}, {}, "nothing of 'score' is there"),
        ({}, {"base_model.model.model.layers.1.mlp.lora_A.weight": 3}, "layers.1.mlp.lora_A.weight is not known"),
        ({}, {"base_model.model.model.layers.1.reft_output.0.rotate_layer.free": None}, "which is no loreft of rank 4"),
    ],
)
def test_a_file_that_is_not_that_of_its_config(tmp_path, config, tensors, message):
    made = pyreft.ReftConfig(layers=[1, 3], positions="l2", intervention="loreft", low_rank_dimension=4)
    pyreft.get_reft_model(pocket.load()[0], made).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights = tmp_path / "adapter_model.safetensors"
    found = load_file(weights) | {name: torch.zeros(size) for name, size in tensors.items() if size}
    save_file({name: value for name, value in found.items() if tensors.get(name, 1)}, weights)
    with pytest.raises(pyreft.ReftError, match=f"the file does not fit its config: .*{message}"):
        describe(tmp_path)


def test_dropout_and_other_settings_are_told(tmp_path):
    config = pyreft.ReftConfig(layers=1, positions="l1", low_rank_dimension=2, dropout=0.25, act_fn="relu")
    pyreft.get_reft_model(pocket.load()[0], config).save(tmp_path)
    (place,) = describe(tmp_path)["places"]
    assert (place["dropout"], place["settings"]["act_fn"]) == (0.25, "relu")
    assert "tokens l1, dropout 0.25, act_fn relu" in run("info", tmp_path).output
