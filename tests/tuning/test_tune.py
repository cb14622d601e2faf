"""Tuning, with real trainings of the embedded model: what comes out, what a stop leaves, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import pyreft
from commands import run
from pyreft import pocket
from pyreft.jobs.held_out import mean_loss, padded_batches
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.methods import count_saved
from pyreft.jobs.settings import TrainingJob
from pyreft.loading import load_adapted
from pyreft.tuning.asked import check_output, read_asked, read_count
from pyreft.tuning.attempt import Attempt, Shared, Watching
from pyreft.tuning.records import DIVERGED, DONE, PRUNED, STOPPED, value_of
from pyreft.tuning.workers import Workplace, marks
from pyreft_cli.app import as_typed

pytest.importorskip("optuna", reason="the extra `tune` is not installed")
SETTINGS = {"epochs": 3, "batch_size": 4, "reach": False}
LIMITS = {"trials": 3, "parameters": "20k", "seed": 3, "settings": SETTINGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    return pyreft.tune(data, tmp_path_factory.mktemp("tuned") / "out", **LIMITS)


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same_adapter(one, other):
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_what_a_tuning_leaves(tuned):
    names = {"best", "best.yaml", "frontier.svg", "study.db", "trials", "trials.json", ".tuning"}
    assert {path.name for path in tuned.output.iterdir()} == names
    assert [record.number for record in tuned.trials] == [0, 1, 2]
    assert json.loads((tuned.output / "trials.json").read_text()) == json.loads(json.dumps(tuned.to_dict()))
    default = tuned.default
    assert (default.number, default.settings["lr"], default.settings["rank"]) == (0, 8e-3, 1)
    assert tuned.best.loss <= default.loss
    assert tuned.picture.read_text().count("not tuned") == 2
    for record in tuned.trials:
        place = tuned.output / "trials" / str(record.number)
        assert record.state == DONE
        assert record.parameters == count_saved(place) <= 20_000
        assert record.seconds > 0
        assert not (place / "checkpoints").exists()


def test_the_best_adapter_has_the_loss_that_it_was_chosen_by(tuned, data):
    adapted, tokenizer = load_adapted(tuned.adapter)
    job = TrainingJob(data=str(data), **SETTINGS, validation_split=0.2, seed=3)
    held_out = PreparedJob(job).validation
    assert mean_loss(adapted, padded_batches(tokenizer, held_out, 32)) == pytest.approx(tuned.best.loss, abs=1e-5)


def test_its_yaml_trains_the_same_adapter(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", "--config", tuned.settings, "--output", "again", "--quiet")
    assert_same_adapter(tmp_path / "again", tuned.adapter)


def test_prefixes_are_computed_once_and_change_nothing(data, tmp_path):
    job = TrainingJob(data=str(data), validation_split=0.2, positions="l4", lr=0.01, epochs=2, batch_size=4)
    shared = Shared(job)

    def missed(name, **settings):
        own = replace(job, output=str(tmp_path / name), **settings)
        made, before = Attempt(own, shared, Watching([3], lambda step, loss: None, lambda: None)), shared.store.missed
        made.train()
        assert made.reach.why_not is None
        return shared.store.missed - before

    assert missed("first", intervention="nodireft", rank=4) > 0
    assert missed("second", intervention="loreft", rank=2) == 0  # of another formula, at the same tokens
    PreparedJob(replace(job, intervention="loreft", rank=2, output=str(tmp_path / "alone"))).train()
    assert_same_adapter(tmp_path / "second", tmp_path / "alone")


def test_an_interrupted_tuning_goes_on_as_if_nothing_had_been(tuned, data, tmp_path):
    out = tmp_path / "out"

    def interrupt(records, left):
        if records[-1].number == 1 and records[-1].curve:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pyreft.tune(data, out, progress=interrupt, **LIMITS)
    assert json.loads((out / "trials.json").read_text())["best"] == 0  # what is done is there to be used
    assert count_saved(out / "best") <= 20_000
    with pytest.raises(pyreft.ReftError, match="already holds a study; choose another directory, or pass `resume`"):
        pyreft.tune(data, out, **LIMITS)
    again = pyreft.tune(data, out, resume=True, **LIMITS)
    assert [record.state for record in again.trials] == [DONE, STOPPED, DONE, DONE]
    done = [record for record in again.trials if record.state == DONE]
    assert [record.point for record in done] == [record.point for record in tuned.trials]
    assert [record.loss for record in done] == [record.loss for record in tuned.trials]
    assert_same_adapter(again.adapter, tuned.adapter)
    assert not (out / "trials" / "1").exists()


@pytest.mark.slow
def test_a_killed_tuning_goes_on(tuned, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(data), "--output", "out", "--parameters", "20k", "--seed", "3", "--epochs", "3"]
    line = ["tune", *options, "--batch-size", "4", "--trials", "3", "--no-reach"]
    process = subprocess.Popen([sys.executable, "-m", "pyreft_cli", *line], stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / "trials" / "0" / "adapter_model.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    found = json.loads(run(*line, "--resume", "--json").stdout)
    done = [record for record in found["trials"] if record["state"] == DONE]
    assert sorted(str(record["point"]) for record in done) == sorted(str(record.point) for record in tuned.trials)
    assert_same_adapter(tmp_path / "out" / "best", tuned.adapter)


def test_a_bad_training_is_stopped_early_and_the_default_never_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pyreft.tuning.study._UNPRUNED", 1)
    given = {"data": str(data), **SETTINGS, "epochs": 8, "positions": "l4", "layers": "2"}
    limits = {"minutes": None, "trials": 4, "parameters": None}
    place = Workplace(read_asked(given, tmp_path, score="loss", jobs=1, **limits))
    study = place.open_study()
    study._distributions["lr"] = study._optuna.distributions.FloatDistribution(1e-4, 1e38, log=True)
    default = place.space.starts[0]
    for lr in (0.02, 2e-4, 1e38):
        study.put(default | {"rank": 4, "lr": lr})
    study.put(default)
    place.work(study, lambda: None)
    found = study.records()
    assert [record.state for record in found] == [DONE, PRUNED, DIVERGED, DONE]
    assert found[1].steps > found[1].curve[-1][0]
    assert [path.name for path in sorted((tmp_path / "trials").iterdir())] == ["0", "3"]
    assert found[3].default
    assert found[3].loss > found[0].loss  # as bad as the one that was stopped


def test_the_time_ends_all_but_the_first_training_and_answers_may_count(data, tmp_path):
    found = pyreft.tune(data, tmp_path, minutes=1e-6, score="exact", settings=SETTINGS)
    (record,) = found.trials
    assert record.state == DONE
    assert record.exact in (0.0, 0.5, 1.0)
    assert record.value == value_of(record.loss, record.exact, 2)


@pytest.mark.slow
def test_several_processes(data, tmp_path):
    found = pyreft.tune(data, tmp_path, trials=5, jobs=2, seed=3, settings=SETTINGS)
    assert [record.state in (DONE, PRUNED) for record in found.trials] == [True] * 5
    assert found.best.loss <= found.default.loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "minutes: expected a number above 0, got 0"),
        ({"minutes": -1.0}, r"minutes: expected a number above 0, got -1\.0"),
        ({"trials": 0}, "trials: expected 1 or more, got 0"),
        ({"jobs": 0}, "jobs: expected 1 or more, got 0"),
        ({"parameters": "20x"}, "parameters: expected a number above 0 such as 5000, 20k or 1.5M, got '20x'"),
        ({"score": "accuracy"}, "score: expected loss or exact, got 'accuracy'"),
        ({"validation_split": 0.0}, "validation_split: expected a share above 0, or a file"),
        ({"settings": {"method": "lora"}}, "method: a tuning has no such setting"),
        ({"settings": {"best": True}}, "best: a tuning has no such setting"),
        ({"settings": {"push_to_hub": "a/b"}}, "push_to_hub: a tuning has no such setting"),
        ({"settings": {"epoch": 3}}, "epoch: a tuning has no such setting. Did you mean 'epochs'?"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(changes, message, tmp_path):
    with pytest.raises(pyreft.ReftError, match=f"^{message}"):
        pyreft.tune("nowhere.jsonl", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_command_names_its_options(tmp_path):
    (tmp_path / "study.db").touch()
    for changes, words in (({"minutes": 0}, "--minutes: expected"), ({}, "--output: ")):
        with pytest.raises(pyreft.ReftError) as caught:
            pyreft.tune("nowhere.jsonl", tmp_path, **changes)
        assert as_typed(caught.value, "tune").startswith(words)
    assert "pass --resume to go on with it" in as_typed(caught.value, "tune")


def test_too_few_examples_for_a_split(tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()[:6]), encoding="utf-8")
    with pytest.raises(
        pyreft.ReftError, match="data: expected at least 8 examples to train on and 2 to score on, got 5"
    ):
        pyreft.tune(few, tmp_path / "out")


def test_an_output_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        pyreft.ReftError, match=r"output: .* holds something else \(notes\.txt\); choose a new or empty"
    ):
        check_output(tmp_path, False)
    with pytest.raises(pyreft.ReftError, match=r"resume: there is no study in .* to go on with"):
        check_output(tmp_path / "new", True)
    with pytest.raises(pyreft.ReftError, match="output: expected a directory"):
        check_output(tmp_path / "notes.txt", False)


def test_without_optuna_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(pyreft.ReftError, match=r'needs Optuna, which is not installed: pip install "pyreft\[tune\]"'):
        pyreft.tune("data.jsonl", tmp_path / "out")


def test_counts_and_marks():
    assert [read_count(text) for text in ("20k", "1.5M", "4_000", 300)] == [20_000, 1_500_000, 4000, 300]
    assert marks(50, 800)[:5] == [12, 18, 25, 35, 50]
    assert max(marks(50, 800)) < 800
    assert marks(1, 1) == []
