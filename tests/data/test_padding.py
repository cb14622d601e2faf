"""Batches of a job are padded on the right: so rows have the positions that `generate` gives them."""

import pytest
import torch

from architectures import ARCHITECTURES
from pyreft import pocket
from pyreft.data.padding import pads_classified, pads_rows
from pyreft.jobs.held_out import mean_loss, padded_batches

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, -100, -100, 8, 9, 10, 11]},
    {"input_ids": [12, 13, 14], "labels": [-100, -100, 14]},
]


@pytest.fixture
def left():
    tokenizer = pocket.load()[1]
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_the_loss_does_not_depend_on_the_batch(name, left):
    model = next(one for one in ARCHITECTURES if one.name == name).make()
    alone, together = (mean_loss(model, padded_batches(left, ROWS, size)) for size in (1, 2))
    assert alone == pytest.approx(together, abs=1e-5)


def test_padding_comes_last_and_the_tokenizer_stays_as_it_is(left):
    batch = pads_rows(left)(ROWS)
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert batch["labels"][1].tolist() == [-100, -100, 14] + [-100] * 4
    classified = pads_classified(left)([{"input_ids": row["input_ids"], "labels": 1} for row in ROWS])
    assert torch.equal(classified["input_ids"], batch["input_ids"])
    assert left.padding_side == "left"
