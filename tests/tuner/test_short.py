"""Prompts that are too short for a rule with a first and a last part."""

import warnings

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import pyreft
from conftest import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8]])
TOLD = "A prompt has one token, such as the start token of a decoder, and '{}' edits nothing there: each"


def adapted(model, positions, **config):
    config = pyreft.ReftConfig(positions=positions, intervention="loreft", low_rank_dimension=2, **config)
    return pyreft.get_reft_model(model, config)


def encoder_decoder():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("positions", ["f1+l1", "f7+l3"])
def test_one_token_is_told_once(positions, share):
    model = adapted(tiny_llama(), positions, share_weights=share).eval()
    with pytest.warns(UserWarning, match=TOLD.format(positions.replace("+", "."))):
        model(torch.tensor([[5, 0, 0], [5, 6, 7]]), attention_mask=torch.tensor([[1, 0, 0], [1, 1, 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS[:, :1])


@pytest.mark.parametrize("rule", ["f1", "l1", "l16", "prompt", "all"])
def test_other_rules_edit_one_token(rule):
    model, base = adapted(tiny_llama(), rule).eval(), tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.allclose(model(IDS[:, :1]).logits, base(IDS[:, :1]).logits, atol=1e-3)
        adapted(tiny_llama(), "f1+l1").eval()(IDS[:, :2])


def test_the_start_token_of_a_decoder():
    model = adapted(encoder_decoder(), "f1+l1", component="decoder.block_output")
    with pytest.warns(UserWarning, match=r"such as the start token of a decoder, and 'f1\+l1' edits nothing there"):
        model.eval().generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(encoder_decoder(), "f1+l1").eval()(input_ids=IDS, labels=IDS)


def test_where_nothing_is_learned_with_gradient_checkpointing():
    """There the loss has a gradient, of the inputs, and a training would go on in silence."""
    model = adapted(encoder_decoder(), "f1+l1", component="decoder.block_output").train()
    base = model.get_base_model()
    new = hasattr(base, "activation_checkpointing_enable")  # its name since transformers 5.2x
    (base.activation_checkpointing_enable if new else base.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="'f1.l1' edits nothing there"):
        model(input_ids=IDS, labels=IDS).loss.backward()
