"""What a job trains if nothing, or little, is said."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

import pyreft
from pyreft import pocket
from pyreft.jobs.methods import attach, learning_rate, make_config
from pyreft.jobs.settings import TrainingJob


def llama(width):
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, **sizes))


@pytest.mark.parametrize("settings", [{}, {"low_rank_dimension": 1}, {"intervention": "lora"}])
def test_a_job_and_a_config_have_one_default(settings):
    job = {{"low_rank_dimension": "rank"}.get(name, name): value for name, value in settings.items()}
    assert make_config(TrainingJob(**job)).to_dict() == pyreft.ReftConfig(**settings).to_dict()
    model = attach(pocket.load()[0], make_config(TrainingJob(**job)), None)
    assert (model.count_parameters(), model.peft_config["default"].positions) == (5376, "l16")


@pytest.mark.parametrize(
    ("settings", "width", "expected"),
    [
        ({}, 64, 8e-3),
        ({}, 576, 8e-3),
        ({}, 4096, 1.1e-3),
        ({"lr": 0.3}, 4096, 0.3),
        ({"rank": 4, "layers": "0"}, 192, 8e-3),
        ({"intervention": "loreft"}, 64, 1e-3),
        ({"component": "block_output"}, 64, 1e-3),
        ({"method": "loreft"}, 64, 1e-3),
        ({"method": "lora"}, 64, 1e-3),
    ],
)
def test_the_learning_rate_suits_the_formula_and_the_width(settings, width, expected):
    assert learning_rate(TrainingJob(**settings), llama(width)) == expected


def test_methods_have_ranks_of_their_own():
    assert make_config(TrainingJob(method="lora")).r == 8
    assert make_config(TrainingJob(method="loreft")).low_rank_dimension == 8
    assert make_config(TrainingJob(intervention="bias")).low_rank_dimension is None
    assert make_config(TrainingJob(component="mlp_output", rank=3)).to_dict()["intervention"] == "loreft"
    with pytest.raises(pyreft.ReftError, match="method 'direft' is the formula 'nodireft', got 'lora'"):
        make_config(TrainingJob(method="direft", intervention="lora"))


def test_a_model_without_attention_is_told_what_can_be_edited():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 9}
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes))
    with pytest.raises(pyreft.ReftError, match=r"'value_output' was not found .* 'block_output', .* formula 'loreft'"):
        pyreft.get_reft_model(model, pyreft.ReftConfig())
    assert pyreft.get_reft_model(model, pyreft.ReftConfig(component="block_output")).count_parameters() == 2 * 264
