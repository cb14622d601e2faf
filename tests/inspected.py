"""What the tests of an inspection look at: a trained adapter, a random GPT-2 with large edits, and texts."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import pyreft
from conftest import shaken
from pyreft.jobs.demo import DATA, SETTINGS
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.settings import TrainingJob

QUESTIONS = ["What is a whale?", "Where can I find a castle?"]


def tiny_gpt2(*representations):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "ln_f" in name:
            parameter.data.uniform_(0.5, 2)  # a norm as trained models have it, not that of the beginning
    return shaken(pyreft.get_reft_model(model, pyreft.ReftConfig(representations=list(representations))))


def place(layer, intervention="bias", positions="l2", component="block_output", **settings):
    return {
        "layer": layer,
        "component": component,
        "intervention": intervention,
        "positions": positions,
        **settings,
    }


ROWS = [{"input_ids": [5, 9, 40, 7, 31]}, {"input_ids": [11, 3, 70]}, {"input_ids": [8, 2, 2, 60, 14, 90, 33]}]


def train_small(output):
    """Train an adapter that answers in emojis, and return its directory."""
    PreparedJob(TrainingJob(data=str(DATA), output=str(output), seed=0, **SETTINGS | {"epochs": 40})).train()
    return output
