"""transformers' own `Trainer` with an adapted model: the best model at the end, resume, what goes to the hub."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import pyreft
from conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, 96, (16, 6), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": [*p, 7, 8], "labels": [-100] * 6 + [7, 8]} for p in prompts])


def trainer(directory, **changes):
    torch.manual_seed(1)
    model = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(positions="f1+l2", low_rank_dimension=4, intervention="loreft")
    )
    settings = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(directory), **settings | changes)
    return Trainer(model=model, args=arguments, train_dataset=rows(0), eval_dataset=rows(1))


def weights(run):
    return [parameter.detach().clone() for parameter in run.model.get_trainable_parameters()]


def test_the_best_model_is_there_at_the_end(tmp_path):
    """At a rate that is too large for the later epochs; the best checkpoint is another than the last."""
    run = trainer(tmp_path, learning_rate=0.1, num_train_epochs=6, lr_scheduler_type="constant")
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6
    assert losses[-1] > min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(one, other)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_what_would_be_uploaded(tmp_path, monkeypatch):
    """Up to the network call, which is all that is replaced."""
    import huggingface_hub

    uploads = []
    repo = huggingface_hub.RepoUrl("https://huggingface.co/someone/adapter")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, *_, **__: repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, **call: uploads.append(call))
    run = trainer(tmp_path, hub_model_id="someone/adapter", num_train_epochs=1)
    run.model.peft_config["default"].base_model_name_or_path = "some/base"
    run.train()
    run.push_to_hub()
    assert uploads[0]["repo_id"] == "someone/adapter"
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "some/base"
    assert "reft" in card.data.tags
    assert "import pyreft" in card.text
