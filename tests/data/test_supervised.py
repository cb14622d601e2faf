"""Prompts and answers to token ids, labels and locations; the collator."""

import warnings

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import pyreft
from conftest import shaken
from pyreft import pocket
from pyreft.data.supervised import encode_pair


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


PROMPTS = [pocket.PROMPT_TEMPLATE % q for q in ("What is a cat?", "Where does the old green turtle live?", "Why?")]
ANSWERS = ["🐱🐾", "In the sea.", "So."]


def rows(module):
    return [module["train_dataset"][i] for i in range(len(PROMPTS))]


def test_last_position(tokenizer):
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, num_interventions=2)
    assert module["eval_dataset"] is None
    for row, prompt, answer in zip(rows(module), PROMPTS, ANSWERS, strict=True):
        length = len(tokenizer(prompt)["input_ids"])
        assert row["input_ids"] == tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        assert row["labels"] == [-100] * length + row["input_ids"][length:]
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert row["intervention_locations"] == [[length - 1]] * 2


def test_several_positions_and_no_end(tokenizer):
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, None, PROMPTS, ANSWERS, positions="f2+l1", num_interventions=2, nonstop=True
    )
    for row, prompt in zip(rows(module), PROMPTS, strict=True):
        length = len(tokenizer(prompt)["input_ids"])
        assert row["intervention_locations"] == [[0, 1], [length - 1, length - 1]]
        assert row["labels"][-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_locations_move_with_the_padding(tokenizer, side):
    tokenizer.padding_side = side
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS)
    batch = module["data_collator"](rows(module))
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    for row, prompt in enumerate(PROMPTS):
        at = batch["intervention_locations"][row, 0, 0]
        last = tokenizer(prompt)["input_ids"][-1]
        assert batch["input_ids"][row, at] == last
        assert batch["labels"][row, at] == -100
        assert batch["labels"][row, at + 1] >= 0
    tokenizer.padding_side = "right"


def test_locations_of_the_originals_data_sets_stay_as_they_are(tokenizer):
    """Its collator did not move them either, and programs for it do that themselves."""
    data = pyreft.ReftRawDataset(
        "raw", None, tokenizer, data_split="test", dataset=[{"instruction": "a b c d e"}, {"instruction": "a"}],
        position="f1", num_interventions=1,
    )  # fmt: skip
    tokenizer.padding_side = "left"
    try:
        batch = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))([data[0], data[1]])
        assert batch["intervention_locations"].tolist() == [[[1]], [[1]]]
        # as examples/*/compute_metrics.py of the original does it
        begin = (batch["input_ids"] == tokenizer.bos_token_id).nonzero(as_tuple=True)[1].reshape(-1, 1, 1)
        at = batch["intervention_locations"] + begin - 1
        assert batch["input_ids"].gather(1, at[:, 0]).tolist() == [[tokenizer.bos_token_id]] * 2
        rows = [{"input_ids": [5] * n, "labels": [5] * n, "intervention_locations": [[0]]} for n in (1, 3)]
        with pytest.warns(UserWarning, match=r"pass ReftDataCollator\(\.\.\., shift=True\)"):
            pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))(rows)
        moved = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer), shift=True)(rows)
        assert moved["intervention_locations"].tolist() == [[[2]], [[0]]]
    finally:
        tokenizer.padding_side = "right"


def test_ragged_locations_are_filled(tokenizer):
    collator = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))
    ragged = [{"input_ids": [5, 6], "labels": [5, 6], "intervention_locations": [[0], [0, 1]]}] * 2
    assert collator(ragged)["intervention_locations"].tolist() == [[[0, -1], [0, 1]]] * 2


@pytest.mark.parametrize(
    "locations",
    [[4], 4, [[-2]], [[1.5]], [[False, True]], torch.tensor([[False, True]]), [["4"]], None, [[1], [2]], [[[1]]]],
)
def test_other_locations_are_told(tokenizer, locations):
    collator = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))
    items = [{"input_ids": [5, 6], "labels": [5, 6], "intervention_locations": at} for at in ([[1]], locations)]
    with pytest.raises(pyreft.ReftError, match=r"locations: row 1 of the batch: expected indices of tokens \(-1 for "):
        collator(items)


@pytest.mark.parametrize("form", [np.array, torch.tensor, tuple])
def test_locations_of_other_kinds(tokenizer, form):
    collator = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))
    items = [{"input_ids": [5, 6], "labels": [5, 6], "intervention_locations": form([[1, -1]])}]
    assert collator(items)["intervention_locations"].tolist() == [[[1, -1]]]


def test_one_text_is_no_list_of_texts(tokenizer):
    """Letters would be as many prompts."""
    for texts, name in ((("Why?", ["a", "b", "c", "d"]), "inputs"), ((["a", "b", "c", "d"], "Why?"), "outputs")):
        with pytest.raises(pyreft.ReftError, match=f"{name}: expected a list of texts, got one text, 'Why.'"):
            pyreft.make_last_position_supervised_data_module(tokenizer, None, *texts)


@pytest.mark.parametrize(
    ("changes", "prompts", "message"),
    [
        ({"pad_token": None}, PROMPTS, "set tokenizer.pad_token = tokenizer.eos_token first"),
        ({"eos_token": None}, PROMPTS, "set tokenizer.eos_token, or pass nonstop=True"),
        ({"model_max_length": 6}, PROMPTS, "Example 0: the prompt of 9 tokens leaves no room"),
        ({}, PROMPTS[:2], "Expected as many answers as prompts, at least one, got 2 and 3"),
        ({}, [*PROMPTS[:2], None], "Example 2: the prompt should be text, got None"),
        ({}, [*PROMPTS[:2], "Hi \ud83d"], "Example 2: the prompt: half a character, .*ud83d', as of an emoji"),
    ],
)
def test_bad_input(changes, prompts, message):
    tokenizer = pocket.load()[1]
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.make_last_position_supervised_data_module(tokenizer, None, prompts, ANSWERS)


def test_the_prompt_is_counted_with_its_own_tokens(tokenizer):
    ids, length = encode_pair(tokenizer, PROMPTS[0], ANSWERS[0])
    assert ids[:length] == tokenizer(PROMPTS[0])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id


def test_a_batch_without_labels_is_refused(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5, 6], "labels": [-100] * 2}]
    collator = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer=tokenizer, label_pad_token_id=-100))
    with pytest.raises(pyreft.ReftError, match="labels: all 2 rows of a batch have nothing but -100"):
        collator(rows)
    rows[1]["labels"] = [-100, 6]
    assert collator(rows)["labels"].shape == (2, 3)


@pytest.mark.parametrize("form", ["last", "multiple"])
def test_a_doubled_bos_is_told_once(form):
    tokenizer = pocket.load()[1]
    make = getattr(pyreft, f"make_{form}_position_supervised_data_module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tokenizer, None, PROMPTS, ANSWERS, num_interventions=2)
    prompts = [PROMPTS[0], *(tokenizer.bos_token + prompt for prompt in PROMPTS[1:])]
    with pytest.warns(UserWarning, match="Row 1: the prompt begins with '<s>' and the tokenizer adds") as caught:
        make(tokenizer, None, prompts, ANSWERS, num_interventions=2)
    assert len(caught) == 1


@pytest.mark.parametrize("pad", ["pad_token", "eos_token"])
def test_every_answer_ends_with_eos_whatever_pads(pad):
    tokenizer = pocket.load()[1]
    tokenizer.pad_token = getattr(tokenizer, pad)
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS)
    batch = module["data_collator"](rows(module))
    for row in range(len(PROMPTS)):
        learned = batch["labels"][row][batch["labels"][row] != -100].tolist()
        read = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert learned[-1] == read[-1] == tokenizer.eos_token_id
        assert learned.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("pad", ["pad_token", "eos_token"])
def test_the_side_and_the_token_of_the_padding_change_no_loss_and_no_gradient(pad):
    model, tokenizer = pocket.load()
    tokenizer.pad_token = getattr(tokenizer, pad)
    config = pyreft.ReftConfig(layers=[1, 3], positions="l1", low_rank_dimension=4, intervention="loreft")
    adapted = shaken(pyreft.get_reft_model(model, config))
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, None, PROMPTS, ANSWERS, positions="f1+l2", num_interventions=2, share_weights=True
    )

    def results(batch):
        adapted.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in adapted.get_trainable_parameters())]

    alone = [results(module["data_collator"]([row])) for row in rows(module)]
    answers = torch.tensor([sum(label != -100 for label in row["labels"]) for row in rows(module)])
    shares = answers / answers.sum()
    mean = [torch.tensordot(shares, torch.stack(each), dims=1) for each in zip(*alone, strict=True)]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for one, other in zip(results(module["data_collator"](rows(module))), mean, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
