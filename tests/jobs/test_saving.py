"""What a job leaves beside its adapter is of the same training, whenever it is killed."""

import csv
import json
import shutil

import pytest
import torch

import pyreft
from conftest import tiny_llama
from killing import kills
from pyreft import pocket
from pyreft.files.adapter import read_config_data
from pyreft.files.record import read_record, write_record
from pyreft.files.together import leave_out
from pyreft.jobs.job import PreparedJob, TrainingJob
from pyreft.jobs.loss_curve import losses_of, write_losses
from pyreft.jobs.methods import save


def adapted(number):
    """An adapter of rank `number`, all of whose numbers are that."""
    model = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(layers=[1], intervention="noreft", low_rank_dimension=number)
    )
    with torch.no_grad():
        for parameter in model.get_trainable_parameters():
            parameter.fill_(number)
    return model


def beside(number, record):
    def write(directory):
        write_losses(directory, losses_of([{"step": 1, "loss": float(number)}]))
        if record:
            write_record(directory, {"seed": number})
        leave_out(directory, "recipe.json", "loss.png")

    return write


def numbers(directory):
    """Which adapter, losses, record and picture a directory holds."""
    adapter = read_config_data(directory)["low_rank_dimension"]
    (edit,) = pyreft.ReftModel.load(directory, tiny_llama()).interventions.values()
    assert edit.learned_source.bias.tolist() == [adapter] * adapter
    rows = list(csv.DictReader((directory / "loss.csv").read_text().splitlines()))
    return adapter, float(rows[0]["loss"]), read_record(directory).get("seed"), (directory / "loss.png").exists()


@pytest.mark.parametrize("record", [True, False])
def test_adapter_losses_and_record_are_of_one_save(tmp_path, monkeypatch, record):
    out = tmp_path / "out"
    save(adapted(1), out, beside(1, True))
    assert numbers(out) == (1, 1, 1, True)
    shutil.copytree(out, tmp_path / "kept")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # so that the new one has no picture
    new, seen = adapted(2), []
    for _ in kills(lambda: save(new, out, beside(2, record))):
        seen.append(numbers(out))
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
    assert set(seen) == {(1, 1, 1, True), (2, 2, 2 if record else None, False)}
    assert numbers(out) == seen[-1] != seen[0]


def test_the_record_of_an_overwritten_adapter_goes(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()), encoding="utf-8")
    job = {"data": str(data), "output": str(tmp_path / "out"), "epochs": 1, "rank": 1, "positions": "l16"}
    PreparedJob(TrainingJob(**job, method="lora")).train()
    assert read_record(tmp_path / "out")["method"] == "lora"
    PreparedJob(TrainingJob(**job, overwrite=True)).train()
    assert read_record(tmp_path / "out") == {}
