"""Encoders and decoders: each has its own tokens, positions and edits."""

import contextlib

import peft
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import pyreft
from conftest import pad, shaken

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PLACES = [
    {"layer": 1, "component": "encoder.block_output", "positions": "f2", "intervention": "red"},
    {"layer": 0, "component": "decoder.block_output", "positions": "f1", "intervention": "loreft"},
    {"layer": 1, "component": "decoder.block_output", "positions": "all", "intervention": "direft"},
]


def bart():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3, "dropout": 0.0}
    stacks = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(
        BartConfig(**sizes, **stacks, **ids, encoder_ffn_dim=64, decoder_ffn_dim=64)
    ).eval()


@pytest.fixture
def adapted():
    config = pyreft.ReftConfig(representations=PLACES, low_rank_dimension=4)
    return shaken(peft.get_peft_model(bart(), config))


def hidden(model, **inputs):
    output = model(**inputs, output_hidden_states=True)
    return output.encoder_hidden_states, output.decoder_hidden_states


def test_each_stream_has_its_own_positions(adapted):
    ids = torch.randint(3, 96, (2, 7))
    labels = torch.cat((torch.full((2, 2), -100), torch.randint(3, 96, (2, 3))), dim=1)
    inputs = {"input_ids": ids, "labels": labels, "decoder_input_ids": torch.randint(3, 96, (2, 5))}
    encoder, decoder = hidden(adapted, **inputs)
    with adapted.disable_adapter():
        plain_encoder, plain_decoder = hidden(adapted, **inputs)
    assert torch.equal(encoder[1], plain_encoder[1])
    assert ((encoder[2] != plain_encoder[2]).any(-1) == torch.tensor([True] * 2 + [False] * 5)).all()
    # the decoder reads the edited encoder: compare with its own edits switched off
    layer = adapted.base_model.model.model.decoder.layers[0].reft_output
    layer.enable_adapters(False)
    _, unedited = hidden(adapted, **inputs)
    layer.enable_adapters(True)
    assert ((decoder[1] != unedited[1]).any(-1) == torch.tensor([True] + [False] * 4)).all()
    assert not torch.equal(decoder[1], plain_decoder[1])


def test_where_a_decoder_prompt_ends(adapted):
    """Behind the start token and the labels without loss, as in generation behind the given decoder tokens."""
    config = pyreft.ReftConfig(
        representations=[{"layer": 0, "component": "decoder.block_output", "positions": "l1", "intervention": "red"}]
    )
    adapted = shaken(peft.get_peft_model(bart(), config))
    ids, decoder_ids = torch.randint(3, 96, (1, 7)), torch.tensor([[1, 40, 50, 60, 70]])  # 1 is the start token
    labels = torch.tensor([[-100, -100, 9, 8, 7]])
    inputs = {"input_ids": ids, "decoder_input_ids": decoder_ids}
    edited = hidden(adapted, **inputs, labels=labels)[1][1]
    with adapted.disable_adapter():
        plain = hidden(adapted, **inputs)[1][1]
    assert (edited != plain).any(-1).tolist() == [[False, False, True, False, False]]
    logits = adapted(**inputs, labels=labels).logits[0, 2]
    step = adapted.generate(
        input_ids=ids,
        decoder_input_ids=decoder_ids[:, :3],
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    torch.testing.assert_close(step.logits[0][0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_padded_batch_generates_what_each_prompt_does(adapted, prompts, options):
    ids, mask = pad(prompts, "right")
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY, **options)
    for row, prompt in enumerate(prompts):
        assert torch.equal(adapted.generate(input_ids=torch.tensor([prompt]), **GREEDY, **options)[0], tokens[row])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_each_row_has_its_own_adapter(adapted, prompts, options):
    adapted.add_adapter("other", pyreft.ReftConfig(component="decoder.mlp_output", positions="all", intervention="red"))
    shaken(adapted)
    ids, mask = pad(prompts, "right")
    names = ["other", "default", "__base__", "default"]
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **GREEDY, **options)
    times = len(tokens) // len(names)
    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        with adapted.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                adapted.set_adapter(name)
            alone = adapted.generate(input_ids=torch.tensor([prompt]), **GREEDY, **options)
        assert torch.equal(alone, tokens[times * row : times * (row + 1)])


def test_given_locations_and_strength_reach_both(adapted):
    ids, decoder_ids = torch.randint(3, 96, (1, 7)), torch.randint(3, 96, (1, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": decoder_ids}
    at = [[[6], [4], [-1]]]
    encoder, decoder = hidden(adapted, **inputs, intervention_locations=at)
    plain = hidden(adapted, **inputs, strength=0)
    with adapted.disable_adapter():
        base = hidden(adapted, **inputs)
    assert torch.equal(plain[0][-1], base[0][-1])
    assert torch.equal(plain[1][-1], base[1][-1])
    assert (encoder[2] != base[0][2]).any(-1)[0].tolist() == [False] * 6 + [True]
    with pytest.raises(pyreft.ReftError, match="expected indices from 0 to 4 in rows of 5 tokens"):
        adapted(**inputs, intervention_locations=[[[6], [5], [-1]]])
    assert torch.equal(hidden(adapted, **inputs, intervention_locations=at)[1][-1], decoder[-1])


@pytest.mark.parametrize("rule", ["f2", "l2", "f1+l1", "prompt", "all"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_without_a_cache_edits_what_it_edits_with_one(rule, beams):
    """Each step reads the answer so far, of which only what the decoder began with is the prompt."""
    place = {"layer": 0, "component": "decoder.block_output", "positions": rule, "intervention": "red"}
    adapted = shaken(pyreft.get_reft_model(bart(), pyreft.ReftConfig(representations=place)))
    options = {**GREEDY, "num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
    for length in (9, 5):  # one generation leaves nothing to the next
        ids = torch.randint(3, 96, (2, length))
        for began in (None, torch.tensor([[1, 7, 8], [1, 9, 5]])):
            found, expected = (
                adapted.generate(input_ids=ids, decoder_input_ids=began, use_cache=use_cache, **options)
                for use_cache in (False, True)
            )
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
