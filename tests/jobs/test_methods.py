"""What a job trains if nothing, or little, is said."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

import pyreft
from pyreft import pocket
from pyreft.jobs.methods import attach, learning_rate, make_config
from pyreft.jobs.settings import TrainingJob, check_settings


def llama(width):
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, **sizes))


@pytest.mark.parametrize("settings", [{}, {"intervention": "lora"}, {"layers": "all", "dropout": 0.1}])
def test_a_job_and_a_config_have_one_default(settings):
    written = pyreft.ReftConfig(positions="l16", **settings).to_dict()  # which a model that generates fills in
    assert make_config(TrainingJob(**settings)).to_dict() == written
    model = attach(pocket.load()[0], make_config(TrainingJob(**settings)), None)
    assert (model.count_parameters(), model.peft_config["default"].positions) == (5376, "l16")


def test_a_rank_alone_is_the_defaults_of_a_job_and_the_originals_in_a_config():
    made = make_config(TrainingJob(rank=4))
    assert (made.intervention, made.low_rank_dimension, made.dropout) == ("lora", 4, 0.3)
    assert pyreft.ReftConfig(low_rank_dimension=4).intervention == "loreft"


def test_what_is_named_has_no_dropout():
    assert make_config(TrainingJob(method="lora")).lora_dropout == 0.0
    assert make_config(TrainingJob(method="lora", dropout=0.2)).lora_dropout == 0.2
    named = {"intervention": "lora"}, {"component": "mlp_output"}, {"method": "loreft"}
    assert [make_config(TrainingJob(**settings)).dropout for settings in named] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "width", "expected"),
    [
        ({}, 64, 8e-3),
        ({}, 576, 8e-3),
        ({}, 4096, 1.1e-3),
        ({"lr": 0.3}, 4096, 0.3),
        ({"rank": 16}, 64, 4e-3),
        ({"rank": 16}, 4096, 5.6e-4),
        ({"rank": 4, "layers": "0"}, 192, 8e-3),
        ({"intervention": "LoRA"}, 64, 8e-3),
        ({"intervention": "loreft"}, 64, 1e-3),
        ({"component": "block_output"}, 64, 1e-3),
        ({"method": "loreft"}, 64, 1e-3),
        ({"method": "lora"}, 64, 1e-3),
    ],
)
def test_the_learning_rate_suits_the_formula_its_rank_and_the_width(settings, width, expected):
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


@pytest.mark.parametrize(("name", "value"), [("method", 5), ("format", 3), ("lr_scheduler_type", 1), ("long_rows", 0)])
def test_a_choice_of_another_type_is_refused(name, value):
    with pytest.raises(pyreft.ReftError, match=rf"^{name}: expected .*, got {value}\.$"):
        check_settings(TrainingJob(data="a.jsonl", output="o", **{name: value}))
