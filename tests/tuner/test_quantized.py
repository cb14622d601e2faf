"""Bases in 8 and 4 bits: edited, trained, saved and loaded as any other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import pyreft
from conftest import shaken, tiny_llama

pytest.importorskip("bitsandbytes")

COMPONENTS = ("block_output", "mlp_activation", "mlp_output", "attention_value_output", "query_output")
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=[8, 4])
def quantized(request, tmp_path):
    """Make the same quantised model again and again."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(**{f"load_in_{request.param}bit": True})
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits).eval()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
def test_a_quantized_base(quantized, tmp_path):
    base = quantized()
    assert "bitsandbytes" in type(base.model.layers[0].mlp.down_proj).__module__
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        plain = quantized()(ids).logits
    places = [{"layer": 1, "component": component, "positions": "f1+l2"} for component in COMPONENTS]
    places += [{"layer": 2, "positions": "l2", "intervention": "lora"}]  # reads what a quantized layer reads
    adapted = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=places, low_rank_dimension=4))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    adapted.train()  # in evaluation, kernels without a backward are taken
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids, prompt_lengths=[4, 5]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    shaken(adapted)
    adapted.save(tmp_path / "adapter")
    again = pyreft.ReftModel.load(tmp_path / "adapter", quantized())
    with torch.no_grad():
        edited = adapted(ids).logits
        assert not torch.equal(edited, plain)
        assert torch.equal(again(ids).logits, edited)
        assert torch.equal(again.generate(input_ids=ids, **GREEDY), adapted.generate(input_ids=ids, **GREEDY))
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, plain)
