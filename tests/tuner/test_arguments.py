"""Whatever way a call gives its tokens, mask and labels, the edits are at the same tokens."""

import asyncio

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

import pyreft
from conftest import CACHE, shaken, tiny_llama
from pyreft.tuner.call import running

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
LEFT = IDS.clone().index_fill(1, torch.arange(0), 0)
LEFT[0, :4] = 0
MASK = (LEFT != 0).long()
RIGHT, RIGHT_MASK = LEFT.flip(1), MASK.flip(1)
TEXT = RIGHT_MASK.bool()


def adapt(positions="l2", **config):
    config = {"intervention": "loreft", "positions": positions, "low_rank_dimension": 3, **config}
    return shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**config))).eval()


def logits(output):
    return torch.stack(output.logits)


@pytest.mark.parametrize("positions", ["f1", "f1+l1", "l2", "prompt", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_infers_the_padding(positions, side):
    """As without edits: from the token that pads, where it is no end of text."""
    adapted = adapt(positions)
    ids = LEFT if side == "left" else RIGHT
    found = adapted.generate(ids, **GREEDY)
    expected = adapted.generate(ids, attention_mask=ids.ne(0).long(), **GREEDY)
    torch.testing.assert_close(logits(found), logits(expected), atol=0, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_infers_the_padding_that_the_models_config_names(side):
    """Of a generation config that leaves a field open, transformers takes it from the model's."""
    adapted = adapt("f1+l1")
    ids = LEFT if side == "left" else RIGHT
    for own, default in (({}, {}), ({"pad_token_id": 0}, {"pad_token_id": 5}), ({}, {"eos_token_id": 0})):
        vars(adapted.generation_config).update({"pad_token_id": 0, "eos_token_id": None, **default})
        mask = None if default.get("eos_token_id") == 0 else ids.ne(0).long()  # padding may then be the end of a text
        config = GenerationConfig(**GREEDY, **own)
        found, expected = (
            adapted.generate(ids, generation_config=config),
            adapted.generate(ids, attention_mask=mask, **GREEDY),
        )
        torch.testing.assert_close(logits(found), logits(expected), atol=0, rtol=0)


def test_what_generate_is_given_by_its_place():
    adapted = adapt()
    config, few = GenerationConfig(**GREEDY), StoppingCriteriaList([MaxLengthCriteria(9)])
    expected = adapted.generate(input_ids=RIGHT, attention_mask=RIGHT_MASK, **GREEDY)
    for model in (adapted, adapted.get_base_model()):
        found = model.generate(RIGHT, config, None, few, attention_mask=RIGHT_MASK)
        torch.testing.assert_close(logits(found), logits(expected)[:2], atol=0, rtol=0)
        with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
            model.generate(RIGHT, inputs=LEFT)


def test_a_mask_and_labels_by_their_places():
    adapted = adapt()
    expected = adapted(input_ids=RIGHT, attention_mask=RIGHT_MASK).logits
    for model in (adapted, adapted.get_base_model()):
        assert torch.equal(model(RIGHT, RIGHT_MASK).logits, expected)
    labels = IDS.where(torch.arange(7) >= 4, -100)
    placed = adapted.get_base_model()(IDS, None, None, None, None, labels)
    assert torch.equal(placed.loss, adapted(input_ids=IDS, labels=labels).loss)


def test_masks_of_other_forms():
    adapted = adapt()
    expected = adapted(input_ids=RIGHT, attention_mask=RIGHT_MASK).logits[TEXT]
    sees = torch.ones(7, 7, dtype=torch.bool).tril() & TEXT[:, None, None, :]
    hidden = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    longer = torch.nn.functional.pad(RIGHT_MASK, (0, 3), value=1)
    for mask in (sees, hidden, longer):
        torch.testing.assert_close(adapted(input_ids=RIGHT, attention_mask=mask).logits[TEXT], expected)
    shorter = adapted(input_ids=RIGHT[:1], attention_mask=RIGHT_MASK[:1, :3]).logits[:, :3]
    torch.testing.assert_close(shorter, expected[None, :3])


def test_calls_between_the_steps_of_a_generation():
    """Those that look like its next step, too: the same ids without a cache, a cache of the same length."""
    adapted = adapt()
    longer = torch.cat((IDS, IDS[:, :1]), dim=1)

    def continued():
        cache = DynamicCache()
        with adapted.disable_adapter():
            adapted(input_ids=torch.full((2, 7), 5), use_cache=True, **{CACHE: cache})
        return adapted(input_ids=torch.tensor([[9, 8]] * 2), use_cache=True, **{CACHE: cache}).logits

    inner = {
        "the same ids": lambda: adapted(input_ids=IDS, use_cache=False).logits,
        "longer ones": lambda: adapted(input_ids=longer, use_cache=False).logits,
        "with a cache that is returned": lambda: adapted(input_ids=IDS).logits,
        "a cache of the same length": continued,
    }
    alone = {name: ask() for name, ask in inner.items()}
    for use_cache in (False, True):
        expected = logits(adapted.generate(IDS, use_cache=use_cache, **GREEDY))
        for name, ask in inner.items():
            found = []

            def look(ids, scores, ask=ask, found=found):
                found.append(ask())
                return scores

            answer = adapted.generate(IDS, use_cache=use_cache, logits_processor=[look], **GREEDY)
            assert torch.equal(logits(answer), expected), name
            assert len(found) == 4
            assert all(torch.equal(one, alone[name]) for one in found), name


@pytest.mark.parametrize("rows", [slice(None), slice(1)])
def test_the_backbone_asked_by_a_hook(rows):
    adapted = adapt()
    backbone = adapted.get_base_model().model
    call = {"input_ids": RIGHT[rows], "attention_mask": RIGHT_MASK[rows]}
    expected, found = backbone(**call)[0], []

    def hook(module, args):
        if not found:
            found.append(None)
            found[0] = backbone(**call)[0]

    plain = adapted(input_ids=LEFT, attention_mask=MASK).logits
    adapted.get_base_model().lm_head.register_forward_pre_hook(hook)
    assert torch.equal(adapted(input_ids=LEFT, attention_mask=MASK).logits, plain)
    assert torch.equal(found[0], expected)


def test_scopes_that_end_in_another_order():
    """Tasks of asyncio in one thread: the adapter is off until the last of them has ended."""
    adapted = adapt()
    with adapted.disable_adapter():
        expected = adapted(input_ids=IDS).logits

    async def first():
        with adapted.disable_adapter():
            await asyncio.sleep(0)

    async def second():
        with adapted.disable_adapter():
            await asyncio.sleep(0.01)
            return adapted(input_ids=IDS).logits

    async def both():
        return (await asyncio.gather(first(), second()))[1]

    assert torch.equal(asyncio.run(both()), expected)
    assert not running.frames


@pytest.mark.parametrize("rows", [None, ["default", "b"]])
@pytest.mark.parametrize("away", ["delete_adapter", "unload"])
def test_an_adapter_that_goes_while_a_call_runs(rows, away):
    adapted = adapt("all")
    adapted.add_adapter("b", pyreft.ReftConfig(positions="all", intervention="noreft", low_rank_dimension=2))
    shaken(adapted)
    adapted.set_adapter("b")
    given = {"adapter_names": rows} if rows else {}
    times = []

    def drop(ids, scores):
        times.append(1)
        if len(times) == 2:
            adapted.delete_adapter("b") if away == "delete_adapter" else adapted.unload()
        return scores

    with pytest.raises(pyreft.ReftError, match=r"while a call with it ran.*Wait for its end"):
        adapted.generate(IDS, logits_processor=[drop], **GREEDY, **given)
    assert not running.frames


def test_an_adapter_that_no_call_uses_goes():
    adapted = adapt("all")
    adapted.add_adapter("b", pyreft.ReftConfig(positions="all", low_rank_dimension=2, intervention="loreft"))
    expected = logits(adapted.generate(IDS, **GREEDY))

    def drop(ids, scores):
        if "b" in adapted.peft_config:
            adapted.delete_adapter("b")
        return scores

    assert torch.equal(logits(adapted.generate(IDS, logits_processor=[drop], **GREEDY)), expected)


@pytest.mark.parametrize("strength", ["x", float("nan"), float("inf"), {"default": "much"}])
def test_a_strength_that_is_no_number(strength):
    adapted = adapt()
    with pytest.raises(pyreft.ReftError, match=r"strength: expected a finite number, got"):
        adapted(input_ids=IDS, strength=strength)
    if not isinstance(strength, dict):
        with pytest.raises(pyreft.ReftError, match=r"strength: expected a finite number, got"):
            adapted.set_strength("default", strength)


def test_one_name_is_no_list_of_names():
    with pytest.raises(pyreft.ReftError, match="adapter_names: expected a list with one name for each row, got 'ab'"):
        adapt()(input_ids=IDS, adapter_names="ab")
