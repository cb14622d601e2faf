"""The original's data sets: what their items hold, and what they say about rows that cannot be learned."""

import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

import pyreft
from conftest import tiny_llama
from original_programs import a_tokenizer
from pyreft import pocket
from pyreft.data.files import alpaca_prompt
from pyreft.dataset import ReftClassificationDataset
from pyreft.reft_trainer import make_data_collator, make_dataloader


@pytest.fixture
def tokenizer():
    return pocket.load()[1]


ROWS = [
    {"instruction": "Name a cat.", "input": "", "output": "Tom."},
    {"instruction": "Say it.", "input": "moon", "output": "The moon."},
]


def supervised(tokenizer, rows=ROWS, **changes):
    arguments = {"num_interventions": 2, "position": "f1+l1"}
    return pyreft.ReftSupervisedDataset("alpaca", None, tokenizer, dataset=rows, **arguments | changes)


def test_items_are_those_of_the_original(tokenizer):
    for row, item in zip(ROWS, supervised(tokenizer), strict=True):
        prompt = alpaca_prompt(row["instruction"], row["input"])
        ids = tokenizer(prompt + row["output"] + tokenizer.eos_token)["input_ids"]
        length = len(tokenizer(prompt)["input_ids"])
        assert item["input_ids"].tolist() == [tokenizer.pad_token_id, *ids]
        assert item["labels"].tolist() == [-100] * (length + 1) + ids[length:]
        assert item["attention_mask"].tolist() == [0] + [1] * len(ids)
        assert item["intervention_locations"] == [[1], [length - 1]]  # the last token of a prompt does not count
    assert supervised(tokenizer)[1]["id"] == 1
    assert supervised(tokenizer, data_split="test").raw_dataset is ROWS
    assert supervised(tokenizer, no_stop=True)[0]["input_ids"][-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(("mode", "added"), [("first", (1, 0)), ("last", (0, 1)), ("none", (0, 0))])
def test_padding_and_short_prompts(tokenizer, mode, added):
    length, plain = len(tokenizer("a b")["input_ids"]), tokenizer("a bc</s>")["input_ids"]
    arguments = {"num_interventions": 1, "position": "f5", "pad_mode": mode}
    rows = [{"instruction": "a b", "output": "c"}]
    item = pyreft.ReftRawDataset("raw", None, tokenizer, dataset=rows, **arguments)[0]
    pad = [tokenizer.pad_token_id]
    assert item["input_ids"].tolist() == pad * added[0] + plain + pad * added[1]
    assert item["attention_mask"].tolist() == [0] * added[0] + [1] * len(plain) + [0] * added[1]
    half = length // 2
    missing = {"first": 0, "last": length, "none": -1}[mode]
    assert item["intervention_locations"] == [[at + added[0] for at in range(half)] + [missing] * (5 - half)]


def test_the_added_token_changes_no_number(tokenizer):
    model = pyreft.get_reft_model(
        pocket.load()[0], pyreft.ReftConfig(positions="l1", layers=[2, 3], low_rank_dimension=4, intervention="loreft")
    )
    collate = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))
    losses = []
    for mode in ("first", "none"):
        rows = supervised(tokenizer, pad_mode=mode)
        batch = collate([rows[0], rows[1]])
        batch.pop("id")
        with torch.no_grad():
            losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_an_eos_token_that_pads_is_still_a_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"instruction": "One.</s>Two.", "output": "Three."}]
    item = pyreft.ReftRawDataset("raw", None, tokenizer, dataset=rows, num_interventions=1, position="l1")[0]
    assert item["attention_mask"].tolist() == [0] + [1] * (len(item["input_ids"]) - 1)


def test_files_and_a_part_of_them(tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    arguments = {"num_interventions": 2, "position": "f1+l1"}
    whole = pyreft.ReftSupervisedDataset("alpaca", str(path), tokenizer, **arguments)
    assert whole[0]["input_ids"].tolist() == supervised(tokenizer)[0]["input_ids"].tolist()
    parts = [
        supervised(tokenizer, rows, max_n_example=1, seed=7)[0]["input_ids"].tolist()
        for rows in (ROWS, Dataset.from_list(ROWS))
    ]
    assert parts[0] == parts[1]
    assert len(supervised(tokenizer, max_n_example=5)) == 2


def test_subspaces_stay_a_list(tokenizer):
    dataset = supervised(tokenizer, [{**row, "subspaces": [0, 2]} for row in ROWS])
    assert dataset[0]["subspaces"] == [[0, 2], [0, 2]]
    batch = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer))([dataset[0], dataset[1]])
    assert batch["subspaces"] == [[[0, 2], [0, 2]]] * 2


def test_preferences_read_one_answer_and_learn_the_other(tokenizer):
    rows = [{"instruction": "Hi.", "chosen_output": "A long and gladly given answer.", "rejected_output": "No."}]
    arguments = {"num_interventions": 1, "position": "l1"}
    item = pyreft.ReftPreferenceDataset("p", None, tokenizer, dataset=rows, **arguments)[0]
    prompt = alpaca_prompt("Hi.")
    length = len(tokenizer(prompt)["input_ids"])
    read = tokenizer(prompt + "No.</s>")["input_ids"]
    learned = tokenizer(prompt + rows[0]["chosen_output"] + "</s>")["input_ids"]
    more = len(learned) - len(read)
    assert item["input_ids"].tolist() == [1, *read] + [1] * more
    assert item["attention_mask"].tolist() == [0] + [1] * len(read) + [0] * more
    assert item["labels"].tolist() == [-100] * (length + 1) + learned[length:]
    assert item["intervention_locations"] == [[length]]
    test = pyreft.ReftPreferenceDataset("p", None, tokenizer, "test", dataset=rows, **arguments)[0]
    assert test["input_ids"].tolist() == [1, *tokenizer(prompt)["input_ids"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_pairs(tokenizer, side):
    tokenizer.padding_side = side
    rows = [
        {"q": "Hi?", "A": "No.", "B": "Yes, gladly and soon.", "a": 0.5, "b": 2},
        {"q": "Ho ho?", "A": "Yes.", "B": "No.", "a": 3, "b": 1},
    ]
    fields = {"conv_A_field": "A", "conv_B_field": "B", "prompt_field": "q"}
    rewards = {"conv_A_reward_field": "a", "conv_B_reward_field": "b"}
    arguments = {"num_interventions": 1, "position": "l1", **fields}
    dataset = pyreft.ReftRewardDataset("r", None, tokenizer, dataset=rows, **arguments, **rewards)
    assert "Yes" in tokenizer.decode(dataset[0]["chosen_output"])
    assert dataset[0].keys() == {
        *("chosen_output", "rejected_output", "chosen_output_mask", "rejected_output_mask"),
        *("chosen_reward", "rejected_reward", "intervention_locations", "id"),
    }
    batch = pyreft.ReftRewardCollator(tokenizer, shift=True)([dataset[0], dataset[1]])
    assert batch["reward"].tolist() == [2, 0.5, 3, 1]
    common = tokenizer("<|user|>Hi?</s><|assistant|>")["input_ids"]
    for row in range(2):
        at = int(batch["intervention_locations"][row, 0, 0])
        assert batch["input_ids"][row, at] == common[-1]
    warns = nullcontext() if side == "right" else pytest.warns(UserWarning, match="ReftRewardCollator.*shift=True")
    with warns:  # as the original leaves them
        left = pyreft.ReftRewardCollator(tokenizer)([dataset[0], dataset[1]])
    assert left["intervention_locations"].flatten().tolist() == [
        item["intervention_locations"][0][0] for item in (dataset[0], dataset[1]) for _ in range(2)
    ]
    plain = pyreft.ReftRewardDataset("r", None, tokenizer, dataset=rows, **arguments)
    assert pyreft.ReftRewardCollator(tokenizer, shift=True)([plain[0]])["reward"].tolist() == [1, 0]


def test_a_doubled_bos_is_told_once(tokenizer):
    rows = [{"instruction": "<s>Hi.", "output": "Ho."}] * 3
    with pytest.warns(UserWarning, match="Row 0: the prompt begins with '<s>' and the tokenizer adds") as caught:
        pyreft.ReftRawDataset("raw", None, tokenizer, dataset=rows, num_interventions=1, position="l1")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        supervised(tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [ROWS[0], {"instruction": "a", "text": "b"}]}, "Row 1: expected a field 'output', there are instr"),
        ({"position": "last"}, "positions: expected f<n>, l<n>"),
        ({"position": None}, "ReftSupervisedDataset: the argument 'position' is missing"),
        ({"num_interventions": None}, "the argument 'num_interventions' is missing"),
        ({"num_interventions": 3}, "need an even number, got 3"),
        ({"pad_token": None}, "set tokenizer.pad_token = tokenizer.eos_token first"),
        ({"model_max_length": 12}, "Example 0: the prompt of \\d+ tokens leaves no room"),
        ({"eos_token": None}, "no_stop=True"),
    ],
)
def test_bad_input(tokenizer, changes, message):
    for name in ("pad_token", "model_max_length", "eos_token"):
        if name in changes:
            setattr(tokenizer, name, changes.pop(name))
    with pytest.raises(pyreft.ReftError, match=message):
        supervised(tokenizer, **changes)


def test_more_bad_input(tokenizer, tmp_path):
    arguments = {"num_interventions": 1, "position": "l1"}
    with pytest.raises(pyreft.ReftError, match=r"none\.json: there is no such file; expected JSON"):
        pyreft.ReftRawDataset("raw", str(tmp_path / "none.json"), tokenizer, **arguments)
    with pytest.raises(NotImplementedError, match="define tokenize"):
        pyreft.ReftDataset("raw", None, tokenizer, dataset=ROWS, **arguments)
    tokenizer.chat_template = None
    with pytest.raises(pyreft.ReftError, match="no chat template to write conversations"):
        pyreft.ReftRewardDataset("r", None, tokenizer, dataset=[], **arguments)

    class NothingToLearn(pyreft.ReftDataset):
        def tokenize(self, data_item):
            return {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, -100])}, 2

    with pytest.raises(pyreft.ReftError, match="Row 0: all of its 2 labels are -100"):
        NothingToLearn("raw", None, tokenizer, dataset=ROWS, **arguments)

    class OfClasses(pyreft.ReftDataset):
        def tokenize(self, data_item):
            return {"input_ids": torch.tensor([5, 6]), "labels": 1}, 2

    with pytest.raises(pyreft.ReftError, match=r"Row 0: labels: expected a value for each token, .*=\['input_ids'\]\."):
        OfClasses("raw", None, tokenizer, dataset=ROWS, **arguments)
    assert OfClasses("raw", None, tokenizer, dataset=ROWS, fields_to_pad=["input_ids"], **arguments)[0]["labels"] == 1


@pytest.mark.parametrize("label", ["label", "text", None])
def test_texts_and_their_labels(tokenizer, label):
    rows = [{"text": "A whale is large.", "label": "yes"}, {"text": "An oak is a fish.", "label": "no"}]
    arguments = {"num_interventions": 2, "position": "f1+l1", "input_field": "text", "label_field": label}
    items = ReftClassificationDataset("words", None, tokenizer, dataset=rows, **arguments)
    for row, item in zip(rows, items, strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        assert item["input_ids"].tolist() == [tokenizer.pad_token_id, *ids]
        assert item["intervention_locations"] == [[1], [len(ids) - 1]]  # the last token of a text does not count
        if label is None:
            assert "labels" not in item
        else:
            assert item["labels"].tolist() == [-100, *tokenizer(row[label])["input_ids"]]


def test_raw_rows_have_their_columns(tokenizer):
    rows = [{"instruction": "Say", "output": "yes"}, {"instruction": "Say it", "output": "no"}]
    arguments = {"dataset": rows, "position": "l1", "num_interventions": 1}
    data = pyreft.ReftRawDataset("raw", None, tokenizer, **arguments)
    for name in ("input_ids", "attention_mask", "intervention_locations", "labels", "id"):
        for row, item in enumerate(data):
            assert torch.equal(torch.as_tensor(getattr(data, name)[row]), torch.as_tensor(item[name]))
    assert data.subspaces is None
    assert pyreft.ReftRawDataset("raw", None, tokenizer, data_split="test", **arguments).labels is None


def test_batches_are_those_of_the_data_modules(tokenizer):
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, ["Say it", "Say"], ["yes", "no"])
    rows = module["train_dataset"]
    loader = make_dataloader(rows, 2, make_data_collator(tokenizer, None), shuffle=False)
    (batch,) = loader
    expected = module["data_collator"]([rows[0], rows[1]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    loader = make_dataloader(rows, 1, make_data_collator(tokenizer, None), shuffle=False, sampler=[1, 0])
    assert [batch["input_ids"][0].tolist() for batch in loader] == [rows[1]["input_ids"], rows[0]["input_ids"]]


def test_what_a_data_set_of_ones_own_hands_on():
    """All that it was given, as in the original, which asks for what it knows."""
    given = {"position": "f1+l1", "num_interventions": 2, "share_weights": True, "input_field": "text"}
    assert pyreft.get_intervention_locations(last_position=6, first_n=1, last_n=1, **given) == [[0, 5], [0, 5]]


def test_a_loss_of_ones_own_takes_the_locations_of_a_data_module():
    """Of prompts that are too short for the rule, too."""
    tokenizer = a_tokenizer()
    prompts = ["w9", "w11 w5 w70 w34 w9 w9 w41"]
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, None, prompts, ["w4", "w5"], positions="f3+l1", num_interventions=2
    )
    assert [list(row) for row in module["train_dataset"]["intervention_locations"]] == [
        [[0, 0, 0], [1, 1, 1]],
        [[0, 1, 2], [7, 7, 7]],
    ]
    batch = module["data_collator"](list(module["train_dataset"]))
    places = [{"layer": layer, "component": "block_output", "low_rank_dimension": 4} for layer in (1, 2)]
    model = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=places))
    locations = batch.pop("intervention_locations")
    with torch.no_grad():
        _, output = model(dict(batch), unit_locations={"sources->base": (None, locations.permute(1, 0, 2).tolist())})
        expected = model(**batch, intervention_locations=[[[0, -1, -1], [1, -1, -1]], [[0, 1, 2], [7, -1, -1]]])
    assert torch.equal(output.logits, expected.logits)
    for ragged in ([[[0], [1]], [[0, 1, 2], [7]]], [["0"]]):
        with pytest.raises(pyreft.ReftError, match="locations: expected whole numbers, as many for each"):
            model(**batch, intervention_locations=ragged)
