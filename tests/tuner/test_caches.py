"""What a cache has when a call begins: nothing, the beginning of another text, or another adapter's keys and values."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig, StaticCache

import pyreft
from conftest import CACHE, pad, shaken
from pyreft.tuner.caches import cache_of, is_empty

GREEDY = {"max_new_tokens": 6, "do_sample": False}
CONFIGS = [
    {"positions": "l3"},
    {"positions": "f1+l2", "intervention": "loreft", "layers": [1, 2]},
    {"positions": "all"},
]


@pytest.fixture(params=CONFIGS, ids=lambda config: config["positions"])
def adapted(request, model):
    return shaken(pyreft.get_reft_model(model, pyreft.ReftConfig(**request.param)))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_right_padded_prompts_with_a_cache_that_is_empty(adapted, prompts, cache):
    made = cache(config=adapted.config, **{"max_cache_len": 32} if cache is StaticCache else {})
    (left, left_mask), (right, right_mask) = pad(prompts, "left"), pad(prompts, "right")
    expected = adapted.generate(input_ids=left, attention_mask=left_mask, **GREEDY)[:, left.shape[1] :]
    options = {CACHE: made, "disable_compile": True}
    found = adapted.generate(input_ids=right, attention_mask=right_mask, **GREEDY, **options)
    assert torch.equal(found[:, right.shape[1] :], expected)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("embedded", [True, False])
def test_right_padded_prompts_in_other_forms(adapted, prompts, kind, embedded):
    (left, left_mask), (right, right_mask) = pad(prompts, "left"), pad(prompts, "right")
    expected = adapted.generate(input_ids=left, attention_mask=left_mask, **GREEDY)[:, left.shape[1] :]
    given = {"input_ids": right, "attention_mask": right_mask.to(kind)}
    if embedded:  # beside the ids
        given["inputs_embeds"] = adapted.get_input_embeddings()(right)
    assert torch.equal(adapted.generate(**given, **GREEDY)[:, right.shape[1] :], expected)


def test_another_end_of_the_prompt(adapted):
    """What takes the place of a prompt's end is a prompt; what comes behind a prompt is none."""
    if adapted.peft_config["default"].positions == "f1+l2":
        pytest.skip("its first two thirds are of either prompt")
    ids, other = torch.randint(3, 96, (2, 1, 12))
    other[:, :8] = ids[:, :8]
    cache = DynamicCache(config=adapted.config)
    with torch.no_grad():
        adapted(ids, **{CACHE: cache})
        cache.crop(-4)
        expected = adapted(other).logits[:, 8:]
        assert torch.allclose(adapted(other[:, 8:], **{CACHE: cache}).logits, expected, atol=1e-4)


def test_drafts_that_are_taken_back(adapted):
    ids, drafts = torch.randint(3, 96, (1, 12)), torch.randint(3, 96, (1, 6))
    cache = DynamicCache(config=adapted.config)
    with torch.no_grad():
        adapted(ids, **{CACHE: cache})
        adapted(drafts[:, :5], **{CACHE: cache})
        cache.crop(-3)
        found = adapted(drafts[:, 2:], **{CACHE: cache}).logits
        expected = adapted(torch.cat([ids, drafts], 1), prompt_lengths=[12]).logits[:, 14:]
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_another_adapter_left(adapted):
    """It tells another adapter of keys and values alone."""
    adapted.add_adapter("other", pyreft.ReftConfig(positions="all"))
    shaken(adapted)
    ids, cache = torch.randint(3, 96, (1, 12)), DynamicCache(config=adapted.config)
    with torch.no_grad():
        adapted(ids[:, :8], **{CACHE: cache})
        plain = copy.deepcopy(cache)
        del plain.reft_past
        adapted.set_adapter("other")
        found, expected = (adapted(ids[:, 8:], **{CACHE: one}).logits for one in (cache, plain))
        with adapted.disable_adapter():
            assert not torch.equal(adapted(ids[:, 8:], **{CACHE: copy.deepcopy(plain)}).logits, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("order", [[1], [1, 0], [0, 0, 1, 1]], ids=["dropped", "moved", "repeated"])
@pytest.mark.parametrize("named", [True, False])
def test_other_rows_behind_the_prompt(adapted, order, named):
    """Of a loop of one's own, in which rows end, change places or become several."""
    adapted.add_adapter("other", pyreft.ReftConfig(positions="all"))
    shaken(adapted)
    names, cache = ["default", "other"], DynamicCache(config=adapted.config)
    ids, more = torch.randint(3, 96, (2, 8)), torch.randint(3, 96, (2, 2))
    with torch.no_grad():
        adapted(ids, **{CACHE: cache}, **{"adapter_names": names} if named else {})
        moved = copy.deepcopy(cache)
        expected = adapted(more, **{CACHE: cache}, **{"adapter_names": names} if named else {}).logits[order]
        moved.batch_select_indices(torch.tensor(order))
        given = {"adapter_names": [names[row] for row in order]} if named else {}
        assert torch.allclose(adapted(more[order], **{CACHE: moved}, **given).logits, expected, atol=1e-4)


def test_a_recurrent_state_that_is_reset():
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, state_size=8, initializer_range=0.2)
    config = pyreft.ReftConfig(positions="l2", component="block_output"), AutoModelForCausalLM.from_config(config)
    adapted = shaken(pyreft.get_reft_model(*reversed(config)))
    ids, other = torch.randint(3, 96, (2, 1, 9))
    with torch.no_grad():
        output = adapted(ids, use_cache=True)
        state = cache_of(output)
        assert not is_empty(state)
        state.reset()
        assert is_empty(state)
        name = next(name for name in output if output[name] is state)
        assert torch.equal(adapted(other, **{name: state}).logits, adapted(other).logits)
