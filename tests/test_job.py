"""Training from files: what comes out, and what is refused before the training starts."""

import csv
import errno
import json

import pytest
import torch

import pyreft
from conftest import tiny_llama
from pyreft import pocket
from pyreft.base import base_of, load_adapted, load_base
from pyreft.checkpoint import read_config
from pyreft.training.job import PreparedJob, TrainingJob

SMALL = {"layers": "3", "positions": "l1", "rank": 2, "epochs": 3, "batch_size": 5, "lr": 0.01}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()), encoding="utf-8")
    return path


def prepared(data, tmp_path, **changes):
    return PreparedJob(TrainingJob(**{"data": str(data), "output": str(tmp_path / "out"), **SMALL} | changes))


def test_what_a_job_leaves(data, tmp_path):
    steps = []
    job = prepared(data, tmp_path, validation_split=0.2)
    result = job.train(lambda *step: steps.append(step))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "loss.csv",
        "loss.png",
    }
    assert [step[:2] for step in steps] == [(n, 6) for n in range(1, 7)]
    rows = list(csv.DictReader((out / "loss.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == list("123456")
    assert float(rows[-1]["loss"]) == result["loss"] < float(rows[0]["loss"])
    assert [row["validation_loss"] != "" for row in rows] == [False, True] * 3
    assert (result["examples"], result["validation_examples"], result["parameters"]) == (8, 2, 2 * 192 * 2 + 2)
    assert read_config(out).prompt_format == "chat"
    adapted, _ = load_adapted(out)
    ids = torch.tensor([[2, 50, 60, 70]])
    assert torch.equal(adapted(ids).logits, job.model(ids).logits)


def test_a_picture_needs_matplotlib_and_nothing_else_does(data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = prepared(data, tmp_path, epochs=1).train()
    assert not result["plot"]
    assert (tmp_path / "out" / "loss.csv").exists()


def test_an_interrupted_job_goes_on_as_if_nothing_had_been(data, tmp_path):
    prepared(data, tmp_path, output=str(tmp_path / "whole"), save_steps=1).train()

    def interrupt(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    job = prepared(data, tmp_path, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        job.train(interrupt)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    last = job.last_checkpoint()
    assert pyreft.ReftModel.load(last, load_base()[0]).count_parameters() == 2 * 192 * 2 + 2
    with pytest.raises(pyreft.ReftError, match="already holds checkpoints; choose another one, or pass overwrite"):
        prepared(data, tmp_path)
    prepared(data, tmp_path, save_steps=1, resume=True).train()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    job = prepared(data, tmp_path, save_steps=2)
    save = pyreft.ReftModel.save

    def full(self, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyreft.ReftModel, "save", full)
    with pytest.raises(OSError, match="No space left"):
        job.train()
    monkeypatch.setattr(pyreft.ReftModel, "save", save)
    pyreft.ReftModel.load(job.last_checkpoint(), load_base()[0])
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "3;9"}, "layer: this model has the layers 0 to 6, got 9."),
        ({"layers": "some"}, "layers: expected 'all', a number"),
        ({"component": "mlp_out"}, "Did you mean 'mlp_output'?"),
        ({"rank": 500}, "expected a rank from 1 to the width 192 of the edited states, got 500"),
        ({"positions": "last4"}, "Did you mean 'l4'?"),
        ({"intervention": "lorefft"}, "Did you mean 'loreft'?"),
        ({"format": "chats"}, "format: expected text, chat, alpaca, got 'chats'. Did you mean 'chat'?"),
        ({"model": "/nowhere/model"}, "model: none could be loaded from '/nowhere/model'"),
        ({"dtype": "float8"}, "dtype: expected auto, float32"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"dropout": 1.5}, "dropout: expected a share from 0 to below 1, got 1.5"),
        ({"validation_split": 0.99}, "of 10 examples, 10 would be held out"),
        ({"validation": "x.jsonl", "validation_split": 0.1}, "validation: give a file or validation_split, not both"),
        ({"max_length": 12}, "the context 12; shorten"),
        ({"resume": True}, "there is no checkpoint to resume from"),
        ({"output": "/proc/nowhere/out"}, "nothing can be written there"),
    ],
)
def test_what_is_refused_before_the_training(data, tmp_path, changes, message):
    with pytest.raises(pyreft.ReftError) as caught:
        prepared(data, tmp_path, **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_overwritten_by_accident(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(pyreft.ReftError, match="already holds an adapter; choose another one, or pass overwrite"):
        prepared(data, tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    prepared(data, tmp_path, epochs=2, overwrite=True).train()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(pyreft.ReftError, match=r"a.yaml: there is no setting 'layer'. Did you mean 'layers'\?"):
        TrainingJob.from_settings({"data": "a", "output": "b", "layer": 3}, "a.yaml")
    with pytest.raises(pyreft.ReftError, match="the setting 'output' is missing"):
        TrainingJob.from_settings({"data": "a"}, "a.yaml")


def test_an_adapter_finds_its_base_model(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert base_of(out) == pocket.path() == config["base_model_name_or_path"]
    for stored, found in (("/elsewhere/site-packages/pyreft/pocket/model", "pocket"), ("some/base", "some/base")):
        (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": stored}))
        assert base_of(out) == found
    for stored, message in (("/gone/model", "is not there any more"), (None, "does not say what its base model is")):
        (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": stored}))
        with pytest.raises(pyreft.ReftError, match=message):
            base_of(out)


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    _, tokenizer = load_base()
    tokenizer.pad_token = None
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path))[1].pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(pyreft.ReftError, match="has neither a padding nor an EOS token"):
        load_base(str(tmp_path))
