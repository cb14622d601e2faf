"""Rows in one batch are those of `generate` in other families: positions learned or turned, windows that slide."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pyreft.loading import load_tokenizer
from pyreft.serving.laptop.engine import Engine
from pyreft.serving.laptop.requests import Request

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
    "gemma3_text": {
        **SIZES,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gpt_neox": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
}
PROMPTS = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (19, 2, 9, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family):
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **ends)).eval()
    model.generation_config.eos_token_id = None
    engine = Engine(model, load_tokenizer(None))
    engine.scheduler.part = 8
    found = [[] for _ in PROMPTS]
    for prompt, own in zip(PROMPTS, found, strict=True):
        deliver = lambda piece, own=own: own.append(piece.choice.token)  # noqa: E731
        engine.submit(Request(prompt, deliver, most=10))
        engine.scheduler.turn()
    while any(engine.scheduler.counts.values()):
        engine.scheduler.turn()
    for prompt, own in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            alone = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
            )
        assert own == alone[0, len(prompt) :].tolist()
