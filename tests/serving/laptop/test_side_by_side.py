"""Rows in one batch are those of `generate` in other families: positions learned or turned, windows that slide."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pyreft
from conftest import shaken
from pyreft.errors import ReftError
from pyreft.loading import load_tokenizer
from pyreft.serving.laptop.engine import Engine
from pyreft.serving.laptop.requests import Request
from pyreft.serving.served import read_adapter

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


def test_no_row_is_so_long_that_it_changes_those_beside_it():
    """With longrope, the longest row of a batch decides on the angles of all."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 32
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model("phi3", **SIZES, **ends, original_max_position_embeddings=32, rope_parameters=rope)
    engine = Engine(AutoModelForCausalLM.from_config(config).eval(), load_tokenizer(None))
    assert engine.context == 32
    with pytest.raises(ReftError, match="has 40 tokens, the model's context 32"):
        engine.check_prompt([5] * 40)


def test_what_generate_does_and_the_engine_does_not_is_told():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **FAMILIES["qwen3"])).eval()
    model.generation_config.update(min_p=0.1, max_new_tokens=7, num_beams=1, no_repeat_ngram_size=3, do_sample=True)
    with pytest.warns(UserWarning, match="asks for no_repeat_ngram_size, which is not served"):
        engine = Engine(model, load_tokenizer(None))
    assert (engine.sampling.min_p, engine.most) == (0.1, 7)


def test_edits_in_columns_that_alternate(tmp_path):
    """Two adapters and the base model in one batch, each as by itself."""
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES, **ends)).eval()

    def config(rule):
        components = ["query_output", "value_output", "attention_output"]
        return pyreft.ReftConfig(component=components, positions=rule, low_rank_dimension=3, intervention="lora")

    adapted = pyreft.get_reft_model(make(), config("l2"), adapter_name="a")
    adapted.add_adapter("b", config("all"))
    shaken(adapted).save_pretrained(str(tmp_path))
    engine = Engine(make(), load_tokenizer(None))
    asked = [(name, prompt) for prompt in PROMPTS for name in ("a", None, "b")]
    found = [[] for _ in asked]
    for (name, prompt), own in zip(asked, found, strict=True):
        deliver = lambda piece, own=own: own.append(piece.choice.token)  # noqa: E731
        engine.submit(Request(prompt, deliver, name and read_adapter(tmp_path / name), most=10))
        engine.scheduler.turn()
    while any(engine.scheduler.counts.values()):
        engine.scheduler.turn()
    answers = {}
    for (name, prompt), own in zip(asked, found, strict=True):
        adapted.set_adapter(name or "a")
        strength = 1.0 if name else 0.0
        ids = torch.tensor([prompt])
        alone = adapted.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0, strength=strength)
        assert own == alone[0, len(prompt) :].tolist()
        answers.setdefault(name, []).append(own)
    assert answers["a"] != answers[None] != answers["b"] != answers["a"]
