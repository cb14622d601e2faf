"""PEFT's helpers for LoRA alone name ours for a model with edits, and serve LoRA as before."""

import peft
import pytest
import torch
from peft import helpers
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from transformers import LlamaConfig, LlamaForCausalLM

from pyreft import ReftConfig, ReftError, get_reft_model


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()


def test_rescaling_names_set_strength():
    model = get_reft_model(base(), ReftConfig(layers=[1]))
    with pytest.raises(ReftError, match=r"rescale_adapter_scale of PEFT takes LoRA alone.*set_strength\(name"):
        helpers.rescale_adapter_scale(model, 0.5)


def test_hotswapping_names_load_intervention(tmp_path):
    model = get_reft_model(base(), ReftConfig(layers=[1]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ReftError, match=r"hotswap_adapter of PEFT takes LoRA alone.*load_intervention"):
        hotswap.hotswap_adapter(model, str(tmp_path), adapter_name="default")


def test_lora_is_rescaled_and_swapped_as_before(tmp_path):
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    layer = next(part for part in model.modules() if isinstance(part, LoraLayer))
    before = layer.scaling["default"]
    with helpers.rescale_adapter_scale(model, 0.5):
        assert layer.scaling["default"] == before / 2
    hotswap.hotswap_adapter(model, str(tmp_path), adapter_name="default")


@pytest.mark.parametrize("beneath", [True, False])
def test_the_casting_of_inputs_is_switched_off_and_on_again(beneath):
    model = base()
    if beneath:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = get_reft_model(model, ReftConfig(layers=[1])).eval()
    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with helpers.disable_input_dtype_casting(model):
            assert not any(layer.cast_input_dtype_enabled for layer in layers)
            assert torch.equal(model(ids).logits, expected)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
