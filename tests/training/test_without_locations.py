"""Training where neither the config nor the data say which tokens: all are edited, as in the original."""

import datasets
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import pyreft
from conftest import tiny_llama
from pyreft import pocket

ROWS = [{"input_ids": [5, 9, 11, 7, 6 + n][: 3 + n], "labels": [-100, -100, 11, 7, 6 + n][: 3 + n]} for n in range(3)]


def trained(tmp_path, **place):
    torch.manual_seed(0)
    config = pyreft.ReftConfig(representations={"layer": 2, "low_rank_dimension": 4, **place})
    model = pyreft.get_reft_model(tiny_llama(), config)
    before = [parameter.detach().clone() for parameter in model.get_trainable_parameters()]
    tokenizer = pocket.load()[1]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    )
    trainer.train()
    assert not any(map(torch.equal, before, model.get_trainable_parameters()))
    return model, trainer.evaluate()["eval_loss"]


def test_all_tokens_are_edited(tmp_path):
    model, loss = trained(tmp_path)
    expected, expected_loss = trained(tmp_path, positions="all")
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for one, other in zip(model.get_trainable_parameters(), expected.get_trainable_parameters(), strict=True):
        torch.testing.assert_close(one, other)
