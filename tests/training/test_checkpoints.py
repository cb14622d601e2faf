"""Checkpoints of a job that a kill or a full disk cut off: training goes on from the one before."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import pyreft
from conftest import tiny_llama
from killing import kills
from pyreft import pocket
from pyreft.files.checkpoints import check_complete, last_complete
from pyreft.jobs.job import PreparedJob, TrainingJob
from pyreft.training.checkpointing import CheckpointingTrainer

SMALL = {
    "intervention": "loreft",
    "layers": "3",
    "positions": "l1",
    "rank": 2,
    "epochs": 3,
    "batch_size": 5,
    "lr": 0.01,
    "save_steps": 2,
}
NEEDED = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "data.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]


def prepared(directory, **changes):
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()), encoding="utf-8")
    return PreparedJob(TrainingJob(**{"data": str(data), "output": str(directory / "out"), **SMALL} | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    prepared(directory, reach=False).train()
    return directory


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained / "out", tmp_path / "out")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def almost(path):
    path.write_bytes(path.read_bytes()[:-2])


def empty(path):
    path.write_bytes(b"")


def blank(path):
    """As where the size was written and the content was not."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("damage", [halve, almost, empty, blank])
def test_a_damaged_file_sends_back_to_the_checkpoint_before(out, name, damage):
    damage(out / "checkpoints" / "checkpoint-6" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is passed over: .*{name}"):
        found = last_complete(out / "checkpoints")
    assert found == str(out / "checkpoints" / "checkpoint-4")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_so_does_a_missing_one(out, name):
    (out / "checkpoints" / "checkpoint-6" / name).unlink()
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        assert last_complete(out / "checkpoints").endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": "6"}, "global_step: expected a whole number, got '6'"),
        ({"global_step": 5}, "global_step: expected that of the directory's name, got 5"),
        ({"log_history": {}}, "log_history: expected a list"),
        ({"log_history": [3]}, "log_history: expected fields, got 3"),
        ({"log_history": [{"loss": 1.0}]}, "log_history: step: expected a whole number, got None"),
        ({"epoch": "x"}, "epoch: expected a number, got 'x'"),
        ({"stateful_callbacks": []}, "stateful_callbacks: expected fields"),
        ({"later": 1}, "this is no state of a Trainer .*later"),
    ],
)
def test_states_that_no_trainer_writes(out, changes, message):
    path = out / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(pyreft.ReftError, match=rf"trainer_state.json: {message}"):
        check_complete(path.parent)


def test_a_job_goes_on_from_the_checkpoint_before(trained, out, tmp_path):
    halve(out / "checkpoints" / "checkpoint-6" / "trainer_state.json")
    (out / "checkpoints" / "checkpoint-6" / "stale.pt").touch()
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        job = prepared(tmp_path, resume=True, reach=False)
    assert job.train()["earlier_steps"] == 4
    found, expected = (load_file(at / "adapter_model.safetensors") for at in (out, trained / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    check_complete(out / "checkpoints" / "checkpoint-6")
    assert not (out / "checkpoints" / "checkpoint-6" / "stale.pt").exists()


def test_where_none_is_left_it_is_told(out, tmp_path):
    for number in (4, 6):
        halve(out / "checkpoints" / f"checkpoint-{number}" / "trainer_state.json")
    with (
        pytest.warns(UserWarning, match="checkpoint-4 is passed over"),
        pytest.raises(pyreft.ReftError, match="there is no checkpoint to resume from"),
    ):
        prepared(tmp_path, resume=True)


def trainer_of(directory, kind, steps):
    torch.manual_seed(0)
    adapted = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(layers=[1], positions="l1", low_rank_dimension=2, intervention="loreft")
    )
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}] * 4
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(directory, max_steps=steps, save_steps=1, save_total_limit=2, **quiet)
    return kind(model=adapted, args=arguments, train_dataset=rows, reach=False)


def test_a_trainer_told_to_resume_goes_on_from_the_checkpoint_before(tmp_path):
    trainer_of(tmp_path, pyreft.ReftTrainer, 3).train()
    halve(tmp_path / "checkpoint-3" / "trainer_state.json")
    trainer = trainer_of(tmp_path, pyreft.ReftTrainer, 4)
    first = []
    trainer.add_callback(FirstStep(first))
    with pytest.warns(UserWarning, match="checkpoint-3 is passed over"):
        trainer.train(resume_from_checkpoint=True)
    assert (first, trainer.state.global_step) == ([2], 4)


def test_a_head_that_is_trained_beside_the_edits_is_resumed(tmp_path):
    """It is in the adapter's file without being one of its own modules."""
    trainer = trainer_of(tmp_path, pyreft.ReftTrainer, 2)
    trainer.model.get_base_model().lm_head.weight.requires_grad_(True)
    trainer.train()
    again = trainer_of(tmp_path, pyreft.ReftTrainer, 2)
    again.model.get_base_model().lm_head.weight.requires_grad_(True)
    again.train(resume_from_checkpoint=True)
    for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class FirstStep(TrainerCallback):
    def __init__(self, told):
        self.told = told

    def on_train_begin(self, args, state, control, **kwargs):
        self.told.append(state.global_step)


def test_a_checkpoint_that_is_killed_at_any_moment_is_complete_or_passed_over(tmp_path):
    trainer = trainer_of(tmp_path, CheckpointingTrainer, 2)
    trainer.train()
    trainer.state.global_step = 3
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in kills(lambda: trainer._save_checkpoint(trainer.model, None)):
            seen.append(Path(last_complete(tmp_path)).name)
            pyreft.ReftModel.load(tmp_path / seen[-1], tiny_llama())
            shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    assert len(seen) > 10
    assert set(seen) == {"checkpoint-2", "checkpoint-3"}
    assert last_complete(tmp_path).endswith("checkpoint-3")
