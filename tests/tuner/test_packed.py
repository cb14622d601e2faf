"""Several examples in one row are edited, and trained, as each in a row of its own."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence

import pyreft
from conftest import CACHE, shaken, tiny_llama
from pyreft.tuner.packed import find_packed, tokens_of

RULES = ["f7+l7", "f1", "l2", "f1+l1", "prompt", "all"]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 13], [14, 15, 16, 17, 18], [19, 20, 21]]
PROMPTS = [4, 2, 3, 0]  # the last is a text without a prompt


def labels_of(row, prompt):
    return [-100] * prompt + row[prompt:]


def apart(labels=True):
    """The rows padded."""
    ids = pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if labels:
        rows = [torch.tensor(labels_of(*pair)) for pair in zip(ROWS, PROMPTS, strict=True)]
        batch["labels"] = pad_sequence(rows, batch_first=True, padding_value=-100)
    return batch


def together(told_by, labels=True, groups=((0, 1, 2, 3),)):
    """The rows one after the other, packed in groups of the same length."""
    batch = {
        "input_ids": torch.tensor([[token for n in group for token in ROWS[n]] for group in groups]),
        "use_cache": False,
    }
    positions = torch.tensor([[at for n in group for at in range(len(ROWS[n]))] for group in groups])
    bounds = [0, *torch.tensor([len(ROWS[n]) for n in groups[0]]).cumsum(0).tolist()]
    batch["position_ids"] = positions
    if told_by == "cu_seq_lens_q":
        batch["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32)
    if labels:
        rows = [[label for n in group for label in labels_of(ROWS[n], PROMPTS[n])] for group in groups]
        batch["labels"] = torch.where(positions == 0, -100, torch.tensor(rows))
    return batch


def adapted(rule, **changes):
    config = pyreft.ReftConfig(positions=rule, low_rank_dimension=4, **{"intervention": "loreft"} | changes)
    return shaken(pyreft.get_reft_model(tiny_llama(), config))


def edited(model, batch):
    """Which tokens the first layer edits."""
    layer = model.base_model.model.model.layers[0]
    seen = []
    with torch.no_grad():
        hook = layer.register_forward_hook(lambda *call: seen.append(call[-1]))
        model(**batch)
        with model.disable_adapter():
            model(**batch)
        hook.remove()
    return (seen[0] != seen[1]).any(-1)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("rule", RULES)
def test_packed_examples_are_edited_as_rows_of_their_own(rule, told_by, labels):
    model = adapted(rule)
    batch = apart(labels)
    expected = edited(model, batch)[batch["attention_mask"].bool()]
    assert torch.equal(edited(model, together(told_by, labels))[0], expected)


@pytest.mark.parametrize(("rule", "formula"), [("f2+l2", "loreft"), ("all", "loreft"), ("l2", "lora")])
def test_packed_examples_have_the_logits_and_gradients_of_rows_of_their_own(rule, formula):
    model = adapted(rule, intervention=formula)
    results = []
    for batch in (apart(), together("cu_seq_lens_q")):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        labels = batch.pop("labels")
        model.zero_grad()
        logits = model(**batch, labels=labels).logits
        asked = torch.where(mask, labels, -100)
        asked[:, 0] = -100
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), asked[:, 1:].flatten()).backward()
        results.append([logits[mask], *(p.grad.clone() for p in model.get_trainable_parameters())])
    for alone, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


def test_a_formula_over_the_tokens_of_a_row_sees_those_of_one_example():
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="prompt", intervention="reftr1")))
    model.set_strength("default", 5.0)
    with torch.no_grad():
        alone = model(**apart(labels=False)).logits[apart()["attention_mask"].bool()]
        torch.testing.assert_close(model(**together("position_ids", labels=False)).logits[0], alone)


def test_a_formula_over_the_tokens_of_a_row_behind_packed_ones():
    """As a step with the cache of a packed row, for its last example."""
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="all", intervention="reftr1")))
    given = together("position_ids", labels=False)
    row = torch.tensor([number for number, one in enumerate(ROWS) for _ in one])
    sees = (row[:, None] == row) & (torch.arange(len(row))[:, None] >= torch.arange(len(row)))
    with torch.no_grad():
        cache = model(**given | {"use_cache": True, "attention_mask": sees[None, None]})[CACHE]
        step = {"input_ids": torch.tensor([[9]]), "position_ids": torch.tensor([[len(ROWS[-1])]])}
        seen = torch.cat((row == len(ROWS) - 1, torch.tensor([True])))[None, None, None]
        packed = model(**step, **{CACHE: cache}, attention_mask=seen).logits
        cache = model(input_ids=torch.tensor([ROWS[-1]]), use_cache=True)[CACHE]
        torch.testing.assert_close(packed, model(**step, **{CACHE: cache}).logits)


def test_several_packed_rows():
    """Each row of the batch holds other examples: 7 + 3 and 3 + 7 tokens."""
    model = adapted("f1+l1", share_weights=False)
    groups = ((0, 3), (1, 0))
    found = edited(model, together("position_ids", groups=groups))
    batch = apart()
    expected = edited(model, batch)
    for row, group in enumerate(groups):
        wanted = torch.cat([expected[n, : len(ROWS[n])] for n in group])
        assert torch.equal(found[row], wanted)


def test_a_rule_of_ones_own_sees_one_example_in_a_row():
    def second(prompt, input_ids):
        assert input_ids.shape == prompt.shape == (4, 7)
        return prompt & (prompt.cumsum(-1) == 2)

    found = edited(adapted(second), together("position_ids"))
    assert found[0].nonzero().flatten().tolist() == [1, 8, 11, 16]


def test_prompt_lengths_are_those_of_the_examples():
    model = adapted("l1")
    found = edited(model, {**together("position_ids", labels=False), "prompt_lengths": [2, 1, 4, 3]})
    assert found[0].nonzero().flatten().tolist() == [1, 7, 13, 17]
    with pytest.raises(pyreft.ReftError, match="a number of prompt tokens for each of the 4 rows"):
        model(**together("position_ids", labels=False), prompt_lengths=[2])


def test_positions_that_count_on_are_one_text():
    model = adapted("l1")
    ids = torch.tensor([ROWS[0]])
    found = edited(model, {"input_ids": ids, "position_ids": torch.arange(3, 3 + ids.shape[1])[None]})
    assert found[0].nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("positions", [True, False])
def test_rows_packed_by_a_mask_of_four_dimensions(kind, positions):
    """Each example is edited as in a row of its own, whether its positions begin anew or not."""
    torch.manual_seed(0)
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="l2", low_rank_dimension=2, intervention="loreft")
        )
    )
    lengths, ids = (6, 4), torch.randint(3, 96, (1, 10))
    allowed = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]
    mask = allowed if kind is torch.bool else torch.zeros(1, 1, 10, 10).masked_fill(~allowed, -1e9)
    given = {"position_ids": torch.tensor([[*range(6), *range(4)]])} if positions else {}
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **given).hidden_states[1]
        with model.disable_adapter():
            plain = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **given).hidden_states[1]
    assert (states != plain).any(-1).tolist() == [[False] * 4 + [True] * 2 + [False] * 2 + [True] * 2]


def test_rows_packed_by_a_mask_of_flex_attention():
    text = torch.tensor([0] * 6 + [1] * 4)
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (text[q] == text[k]), 1, None, 10, 10, device="cpu")
    ids = torch.arange(1, 11)[None]
    packed = find_packed(ids, {"attention_mask": mask})
    assert packed is not None
    assert packed.apart(ids, 0).tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]
    assert tokens_of(mask, ids, 1, 10).all()


@pytest.mark.parametrize("labels", [True, False])
def test_two_answers_to_one_prompt_in_a_row(labels):
    """By a mask of four dimensions both see the prompt, which is edited for both."""
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="l2")))
    prompt, one, other = (torch.randint(3, 96, (1, n)) for n in (6, 3, 4))
    allowed = torch.ones(13, 13).tril().bool()
    allowed[9:, 6:9] = False
    row = {
        "input_ids": torch.cat([prompt, one, other], 1),
        "attention_mask": allowed[None, None],
        "position_ids": torch.tensor([[*range(9), *range(6, 10)]]),
    }
    given = {"labels": torch.where(torch.arange(13) < 6, -100, row["input_ids"])} if labels else {"prompt_lengths": [6]}
    with torch.no_grad():
        found = model(**row, **given).logits
        apart = [model(torch.cat([prompt, answer], 1), prompt_lengths=[6]).logits for answer in (one, other)]
    assert torch.allclose(found, torch.cat([apart[0], apart[1][:, 6:]], 1), atol=1e-4)


def test_padding_between_prompt_and_answer_by_a_mask_of_four_dimensions():
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="l2")))
    ids, mask = torch.randint(3, 96, (1, 10)), torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    given = {"input_ids": ids, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "prompt_lengths": [4]}
    allowed = torch.ones(10, 10).tril().bool() & mask.bool()[:, None]
    with torch.no_grad():
        found, expected = (model(**given, attention_mask=one).logits for one in (allowed[None], mask))
    assert torch.allclose(found[:, mask[0].bool()], expected[:, mask[0].bool()], atol=1e-4)


def test_examples_that_see_each_other_through_a_cache_are_told():
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="l2", low_rank_dimension=2, intervention="loreft")
        )
    )
    with pytest.warns(UserWarning, match="with a cache transformers lets each of them see those before it"):
        model(input_ids=torch.randint(3, 96, (1, 5)), position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=True)
