"""Training from files: what comes out, and what is refused before the training starts."""

import csv
import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pyreft
from conftest import tiny_llama
from pyreft import pocket
from pyreft.describe import describe
from pyreft.files.adapter import read_config
from pyreft.files.checkpoints import DATA_FILE
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.settings import TrainingJob
from pyreft.loading import base_of, load_adapted, load_base

SMALL = {
    "intervention": "loreft",
    "layers": "3",
    "positions": "l1",
    "rank": 2,
    "epochs": 3,
    "batch_size": 5,
    "lr": 0.01,
}


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


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({"intervention": "lora"}, [1, 1, 1, 1, 1, 1]),
        ({"intervention": "lora", "warmup_ratio": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ({"intervention": "lora", "lr_scheduler_type": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_scheduler_type": "cosine"}, [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]),
    ],
)
def test_the_rate_stays_for_lora_and_falls_for_others(data, tmp_path, changes, shares):
    job = prepared(data, tmp_path, **changes)
    job.train()
    history = json.loads((Path(job.last_checkpoint()) / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "loss" in entry] == pytest.approx([0.01 * s for s in shares])


def momentum(job):
    """Adam's, as the last checkpoint has it."""
    state = torch.load(Path(job.last_checkpoint()) / "optimizer.pt", weights_only=True)
    return {group["betas"][0] for group in state["param_groups"]}


@pytest.mark.parametrize(("changes", "expected"), [({}, 0.9), ({"adam_beta1": 0.5}, 0.5), ({"adam_beta1": 0}, 0)])
def test_the_momentum_of_adam_is_as_asked(data, tmp_path, changes, expected):
    job = prepared(data, tmp_path, epochs=1, **changes)
    job.train()
    assert momentum(job) == {expected}


def test_a_schedule_that_is_not_known(data, tmp_path):
    with pytest.raises(pyreft.ReftError, match=r"expected constant, linear, cosine, got 'constnat'\..*'constant'"):
        prepared(data, tmp_path, lr_scheduler_type="constnat")


@pytest.mark.parametrize("component", [None, "query_output,mlp_output", ["query_output", "mlp_output"]])
def test_lora_at_some_tokens(data, tmp_path, component):
    settings = {"component": component, "alpha": 6, "intervention": "lora", "output": str(tmp_path / "out")}
    job = PreparedJob(TrainingJob.from_settings({"data": str(data), **SMALL, **settings}, "train"))
    result = job.train()
    config = read_config(tmp_path / "out")
    chosen = ["query_output", "mlp_output"] if component else ["value_output", "attention_output"]
    assert (config.component, config.intervention_kwargs) == (chosen, {"alpha": 6.0})
    assert result["loss"] < float(next(csv.DictReader((tmp_path / "out" / "loss.csv").open()))["loss"])
    places = describe(tmp_path / "out")["places"]
    assert [(place["component"], place["layers"]) for place in places] == [(name, [3]) for name in chosen]
    assert result["computed"].startswith("Each step leaves out")


def test_a_picture_needs_matplotlib_and_nothing_else_does(data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = prepared(data, tmp_path, epochs=1).train()
    assert not result["plot"]
    assert (tmp_path / "out" / "loss.csv").exists()


@pytest.mark.parametrize("reach", [True, False])
def test_an_interrupted_job_goes_on_as_if_nothing_had_been(data, tmp_path, reach):
    prepared(data, tmp_path, output=str(tmp_path / "whole"), save_steps=1, reach=reach).train()

    def interrupt(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    job = prepared(data, tmp_path, save_steps=1, reach=reach)
    with pytest.raises(KeyboardInterrupt):
        job.train(interrupt)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    last = job.last_checkpoint()
    assert pyreft.ReftModel.load(last, load_base()[0]).count_parameters() == 2 * 192 * 2 + 2
    with pytest.raises(pyreft.ReftError, match="already holds checkpoints; choose another one, or pass `overwrite`"):
        prepared(data, tmp_path)
    prepared(data, tmp_path, save_steps=1, resume=True, reach=reach).train()
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert (out / "adapter_config.json").read_bytes() == (whole / "adapter_config.json").read_bytes()
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (out, whole))
    # a resumed run computes prefixes again, in other batches than the first time, which rounds differently
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 if reach else 0)


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
    result = prepared(data, tmp_path, save_steps=2, resume=True).train()  # nothing is left but to save it
    assert (result["earlier_steps"], result["steps"]) == (6, 6)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/1"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_taken_back(data, tmp_path, monkeypatch, error):
    job = prepared(data, tmp_path, save_steps=2)
    save = transformers.Trainer._save_optimizer_and_scheduler

    def full(self, directory):
        if directory.endswith("-4"):
            raise error
        save(self, directory)

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        job.train()
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert prepared(data, tmp_path, resume=True).train()["steps"] == 6


def test_a_checkpoint_cut_short_is_not_resumed_from(data, tmp_path):
    job = prepared(data, tmp_path, save_steps=2)
    job.train()
    (tmp_path / "out" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert job.last_checkpoint().endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 3}, "was made with low_rank_dimension = 2, now it is 3"),
        ({"positions": "l2"}, "was made with positions = 'l1', now it is 'l2'"),
        ({"layers": "1"}, r"was made with layers = \[3\], now it is \[1\]"),
        ({"format": "text"}, "was made with prompt_format = 'chat', now it is 'text'"),
        ({"lr": 0.02}, r"resume: .*was made with lr = 0\.01, now it is 0\.02; a training goes on with the settings it"),
        ({"adam_beta1": 0.5}, r"was made with adam_beta1 = 0\.9, now it is 0\.5"),
        ({"warmup_ratio": 0.1}, r"was made with warmup_ratio = 0\.0, now it is 0\.1"),
        ({"lr_scheduler_type": "cosine"}, "was made with lr_scheduler_type = 'linear', now it is 'cosine'"),
        ({"seed": 7}, "was made with seed = 42, now it is 7"),
        ({"batch_size": 2}, "was made with batch_size = 5, now it is 2"),
        ({"weight_decay": 0.1}, r"was made with weight_decay = 0\.0, now it is 0\.1"),
        ({"dropout": 0.1}, r"was made with dropout = 0\.0, now it is 0\.1"),
        ({"dtype": "bfloat16"}, "was made with dtype = 'auto', now it is 'bfloat16'"),
    ],
)
def test_other_settings_cannot_go_on_from_a_checkpoint(data, tmp_path, changes, message):
    prepared(data, tmp_path, epochs=1).train()
    with pytest.raises(pyreft.ReftError, match=message):
        prepared(data, tmp_path, resume=True, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "was made with lr_scheduler_type = 'linear', now it is 'constant'"),
        ({"lr_scheduler_type": "linear", "adam_beta1": 0.5}, r"was made with adam_beta1 = 0\.9, now it is 0\.5"),
    ],
)
def test_a_checkpoint_that_names_no_schedule_and_no_momentum_had_the_usual_ones(data, tmp_path, changes, message):
    job = prepared(data, tmp_path, epochs=1, intervention="lora", lr_scheduler_type="linear")
    job.train()
    path = Path(job.last_checkpoint()) / DATA_FILE
    facts = json.loads(path.read_text())
    del facts["settings"]["lr_scheduler_type"], facts["settings"]["adam_beta1"]
    path.write_text(json.dumps(facts))
    with pytest.raises(pyreft.ReftError, match=message):
        prepared(data, tmp_path, resume=True, intervention="lora", **changes)


def test_a_training_that_diverges_stops_there_and_leaves_nothing_of_it(data, tmp_path):
    job = prepared(data, tmp_path, lr=1e38, save_steps=1)
    with pytest.raises(pyreft.ReftError) as caught:
        job.train()
    told = caught.value.told({"lr": "--lr"})
    assert "The training diverges: " in told
    assert "step 1" in told or "step 2" in told
    assert "Try a smaller --lr (now 1e+38)" in told
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    last = job.last_checkpoint()
    assert f"The last good checkpoint is {last}" in told if last else "There is no checkpoint yet" in told
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())


def test_the_last_good_checkpoint_stays(data, tmp_path):
    """Where the numbers go wrong after it was made."""

    def spoil(step, *_):
        if step == 2:
            next(p for p in job.model.parameters() if p.requires_grad).data.fill_(torch.nan)

    job = prepared(data, tmp_path, save_steps=1)
    with pytest.raises(pyreft.ReftError, match=r"diverges.*The last good checkpoint is .*checkpoint-[12]\."):
        job.train(spoil)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    for tensor in load_file(f"{job.last_checkpoint()}/adapter_model.safetensors").values():
        assert bool(torch.isfinite(tensor).all())


def test_a_prompt_too_short_for_the_rule_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "", "completion": "b"}\n')  # of which the BOS token is left
    options = {"data": str(path), "layers": "3", "format": "text", "reach": False}
    PreparedJob(TrainingJob(**options, positions="all"))
    with pytest.raises(pyreft.ReftError, match=r"line 1: the prompt is empty, there is nothing of it to edit"):
        PreparedJob(TrainingJob(**options, positions="l1"))
    with pytest.raises(pyreft.ReftError, match=r"line 1: the prompt has 1 token, .* or give other `positions`"):
        PreparedJob(TrainingJob(**options, positions="f7+l7"))


def test_a_chat_is_held_out_as_a_whole(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B")) * 3]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    job = PreparedJob(TrainingJob(data=str(path), layers="3", positions="l1", validation_split=0.25, reach=False))
    assert (len(job.rows), len(job.validation)) == (9, 3)


def test_no_example_is_both_held_out_and_trained_on(data, tmp_path):
    (tmp_path / "twice.jsonl").write_text(2 * data.read_text(encoding="utf-8"), encoding="utf-8")
    once, twice = (
        PreparedJob(TrainingJob(data=str(path), validation_split=0.3)) for path in (data, tmp_path / "twice.jsonl")
    )
    assert (once.shared, twice.shared) == (0, 0)
    assert [e.prompt for e in twice.validation_examples] == 2 * [e.prompt for e in once.validation_examples]
    assert len(twice.rows) == 2 * len(once.rows)
    part = PreparedJob(TrainingJob(data=str(data), validation=str(tmp_path / "twice.jsonl")))
    assert part.shared == len(part.validation) == 2 * len(part.rows)


@pytest.mark.parametrize("change", ["fewer", "another", "held out"])
def test_other_data_cannot_go_on_from_a_checkpoint(data, tmp_path, change):
    prepared(data, tmp_path, epochs=1).train()
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    if change != "held out":
        lines = lines[:9] if change == "fewer" else [*lines[:9], lines[9].replace("?", "!")]
    data.write_text("".join(lines), encoding="utf-8")
    split = 0.1 if change == "held out" else 0.0
    count = 10 if change == "another" else 9
    message = rf"resume: .*checkpoint-2 was trained on other data \(10 rows, now {count}\); resume with the same data"
    with pytest.raises(pyreft.ReftError, match=message):
        prepared(data, tmp_path, resume=True, validation_split=split)


@pytest.mark.parametrize(("epochs", "steps"), [(2, 4), (1, 2)])
def test_nothing_is_left_to_resume(data, tmp_path, epochs, steps):
    prepared(data, tmp_path, epochs=2).train()
    message = f"resume: nothing is left to train: 4 steps are done, and the job has {steps}; give more `epochs`"
    with pytest.raises(pyreft.ReftError, match=message):
        prepared(data, tmp_path, epochs=epochs, resume=True)
    (tmp_path / "out" / "loss.csv").unlink()  # as where it was cut off while it wrote
    assert prepared(data, tmp_path, epochs=epochs, resume=True).train()["earlier_steps"] == 4
    assert (tmp_path / "out" / "loss.csv").exists()
    result = prepared(data, tmp_path, epochs=3, resume=True, dropout=0.0).train()  # which it was, unsaid
    assert (result["earlier_steps"], result["steps"]) == (4, 6)


def test_another_base_model_cannot_go_on_from_a_checkpoint(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    _, tokenizer = load_base()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(pyreft.ReftError, match=r"this one has hidden_size 32 instead of 192, num_hidden_layers 4 inst"):
        prepared(data, tmp_path, resume=True, model=str(tmp_path / "base"))


def test_other_weights_of_the_same_shape_cannot_go_on_from_a_checkpoint(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    base, tokenizer = load_base()
    base.model.layers[3].mlp.down_proj.weight.data.mul_(1.01)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    message = "resume: .*checkpoint-2 was trained on another base model, of the same shape and with other weights"
    with pytest.raises(pyreft.ReftError, match=message):
        prepared(data, tmp_path, resume=True, model=str(tmp_path / "base"))
    shutil.copytree(pocket.path(), tmp_path / "moved")  # the same one elsewhere
    prepared(data, tmp_path, resume=True, model=str(tmp_path / "moved"))


def test_what_is_held_out_depends_on_the_seed_alone(data, tmp_path):
    jobs = [prepared(data, tmp_path, validation_split=0.3, seed=seed) for seed in (1, 1, 2)]
    assert jobs[0].validation == jobs[1].validation != jobs[2].validation
    for job in jobs:
        assert len(job.rows) == 7
        assert not [row for row in job.validation if row in job.rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "3;9"}, "layer: this model has the layers 0 to 6, got 9."),
        ({"layers": "some"}, "layers: expected 'all', a number"),
        ({"component": "mlp_out"}, "Did you mean 'mlp_output'?"),
        ({"component": "block_output", "intervention": "lora"}, "no linear layer writes 'block_output'"),
        ({"alpha": 3}, "alpha: it is LoRA's; representation edits have no such setting"),
        ({"rank": 0, "intervention": "lora"}, "low_rank_dimension: expected 1 or more, got 0"),
        ({"rank": 0}, "expected a rank from 1 to the width 192 of the edited states, got 0"),
        ({"rank": 500}, "expected a rank from 1 to the width 192 of the edited states, got 500"),
        ({"positions": "last4"}, "Did you mean 'l4'?"),
        ({"intervention": "lorefft"}, "Did you mean 'loreft'?"),
        ({"format": "chats"}, "format: expected text, chat, alpaca, got 'chats'. Did you mean 'chat'?"),
        ({"model": "/nowhere/model"}, "model: none could be loaded from '/nowhere/model'"),
        ({"dtype": "float8"}, "dtype: expected auto, float32"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"save_steps": 0}, "save_steps: expected a number above 0, got 0"),
        ({"seed": -1}, "seed: expected a number from 0 to 2**32 - 1, got -1"),
        ({"weight_decay": -1.0}, "weight_decay: expected 0 or more, got -1.0"),
        ({"dropout": 1.5}, "dropout: expected a share from 0 to below 1, got 1.5"),
        ({"validation_split": 0.99}, "10 of 10 would be held out"),
        ({"validation": "x.jsonl", "validation_split": 0.1}, "validation: give a file or `validation_split`, not both"),
        ({"max_length": 12}, "the context 12; shorten"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'?"),
        ({"report_to": "trackio"}, "report_to: trackio is not installed; `pip install trackio`"),
        ({"resume": True}, "there is no checkpoint to resume from"),
        ({"resume": True, "overwrite": True}, "overwrite: give one of `resume`, which goes on with what is there, and"),
        ({"reach": False, "reach_memory": "1GB"}, "reach_memory: nothing is held where each step computes whole rows"),
        ({"reach": False, "reach_directory": "held"}, "reach_directory: nothing is held where each step computes"),
        ({"output": "/proc/nowhere/out"}, "nothing can be written there"),
    ],
)
def test_what_is_refused_before_the_training(data, tmp_path, changes, message):
    with pytest.raises(pyreft.ReftError) as caught:
        prepared(data, tmp_path, **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_losses_are_logged_where_asked(data, tmp_path):
    result = prepared(data, tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(next((tmp_path / "out" / "checkpoints" / "runs").iterdir()))).Reload()
    losses = events.Scalars("train/loss")
    assert [loss.step for loss in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1].value == pytest.approx(result["loss"])


def test_an_adapter_is_not_overwritten_by_accident(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(pyreft.ReftError, match="already holds an adapter; choose another one, or pass `overwrite`"):
        prepared(data, tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    prepared(data, tmp_path, epochs=2, overwrite=True).train()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(pyreft.ReftError, match=r"a.yaml: there is no setting 'layer'. Did you mean 'layers'\?"):
        TrainingJob.from_settings({"data": "a", "output": "b", "layer": 3}, "a.yaml")
    with pytest.raises(pyreft.ReftError, match=r"no setting 'learning_rate'. `pyreft train --help` lists them\."):
        TrainingJob.from_settings({"data": "a", "output": "b", "learning_rate": 3}, "a.yaml")
    with pytest.raises(pyreft.ReftError, match="the setting 'output' is missing"):
        TrainingJob.from_settings({"data": "a"}, "a.yaml")


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("lr", "1e-3", 0.001),  # YAML's own reading of 1e-3
        ("epochs", 3, 3.0),
        ("rank", "4", 4),
        ("layers", [1, 2], "1;2"),
        ("layers", 3, "3"),
        ("save_steps", "1e1", 10),
        ("prompt_field", 1, "1"),
        ("max_length", None, None),
        ("share_weights", False, False),
    ],
)
def test_how_settings_are_read(name, value, read):
    job = TrainingJob.from_settings({"data": "a", "output": "b", name: value}, "a.yaml")
    assert getattr(job, name) == read
    assert type(getattr(job, name)) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "three", "a.yaml: epochs: expected a number, got 'three'"),
        ("lr", True, "a.yaml: lr: expected a number, got True"),
        ("lr", "nan", "a.yaml: lr: expected a number, got 'nan'"),
        ("rank", 2.5, "a.yaml: rank: expected a whole number, got 2.5"),
        ("share_weights", "no", "a.yaml: share_weights: expected true or false, got 'no'"),
        ("output", ["o"], "a.yaml: output: expected text, got ['o']"),
        ("output", 1.1, "a.yaml: output: expected text, got 1.1. Put it in quotes."),  # of which YAML had 1.10
        ("on_error", True, "a.yaml: on_error: expected text, got True"),
        ("turns", None, "a.yaml: turns: expected text, got None"),
    ],
)
def test_settings_of_another_type(name, value, message):
    with pytest.raises(pyreft.ReftError) as caught:
        TrainingJob.from_settings({"data": "a", "output": "b", name: value}, "a.yaml")
    assert message in str(caught.value)


def test_lora_at_every_token_takes_no_rule_that_edits_have_by_default():
    common = {"data": "a", "output": "b", "method": "lora"}
    assert TrainingJob.from_settings(common, "a.yaml").method == "lora"
    for name, value in (("positions", "l16"), ("layers", "all"), ("share_weights", True)):
        with pytest.raises(pyreft.ReftError, match=f"{name}: LoRA has no such setting, got {value!r}; leave it out"):
            TrainingJob.from_settings(common | {name: value}, "a.yaml")


def test_a_base_model_given_by_a_relative_path_is_found_from_anywhere(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, tokenizer = load_base()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    prepared(data, tmp_path, model="base", layers="1", epochs=1).train()
    assert base_of(tmp_path / "out") == str(tmp_path / "base")


def test_an_adapter_finds_its_base_model(data, tmp_path):
    prepared(data, tmp_path, epochs=1).train()
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert base_of(out) == config["base_model_name_or_path"] == "pocket"
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


@pytest.mark.parametrize("own", [None, 7, [7, 8]])
def test_answers_end_at_the_token_with_which_they_are_trained_to_end(tmp_path, own):
    _, tokenizer = load_base()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = own
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ends = load_base(str(tmp_path))[0].generation_config.eos_token_id
    assert ends == [*([own] if isinstance(own, int) else own or ()), tokenizer.eos_token_id]


def test_a_job_is_for_one_process(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is a whale?", "completion": "🐳"}\n', encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pyreft.ReftError, match=r"one process, and 2 were launched.*ReftTrainer"):
        PreparedJob(TrainingJob(data=data, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
