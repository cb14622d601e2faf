"""Trainers that compute only what the edits can reach train what the others do."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import pyreft
from conftest import tiny_llama
from pyreft import pocket
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.settings import TrainingJob
from pyreft.reach import Reach, ReachCallback
from reaching import adapt, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


def examples():
    rows = rows_of(*(n % 9 + 4 for n in range(22)))
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * (len(row) - 2) + row[-2:] for row in rows]})


def trainer_of(tokenizer, directory, *, reach=True, kind=pyreft.ReftTrainerForCausalLM, **changes):
    # plain gradient descent: Adam would make rounding of tiny gradients large
    arguments = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd"}
    arguments |= {"max_grad_norm": 0.0, "logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
    adapted = adapt(tiny_llama(), positions="l1", layers=[1])
    return kind(
        model=adapted,
        processing_class=tokenizer,
        args=TrainingArguments(output_dir=str(directory), **arguments | changes),
        train_dataset=examples(),
        eval_dataset=examples().select(range(5)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        reach=reach,
    )


class Plain(Trainer):
    def __init__(self, *args, reach, **kwargs):
        super().__init__(*args, **kwargs)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True, "use_cpu": True},
        {"eval_strategy": "epoch", "prediction_loss_only": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_training_in_part_is_training(tokenizer, tmp_path, settings, capsys):
    trainers = []
    for reach in (True, False):
        trainers.append(trainer_of(tokenizer, tmp_path, reach=reach, **settings))
        before = weights(trainers[-1])
        trainers[-1].train()
    in_part, whole = trainers
    assert in_part.reach.why_not is None
    assert capsys.readouterr().out.count("Each step leaves out ") == 1
    assert whole.reach is None
    moved = (weights(whole) - before).norm()
    assert moved > 0.02
    # in bfloat16, each gradient is off by some percent, in either way
    assert (weights(in_part) - weights(whole)).norm() <= (0.05 if "bf16" in settings else 1e-4) * moved
    if "eval_strategy" in settings:
        losses = [[log["eval_loss"] for log in one.state.log_history if "eval_loss" in log] for one in (in_part, whole)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.slow  # to compile each shape
def test_a_compiled_training_is_training(tokenizer, tmp_path, capsys):
    trainers = [trainer_of(tokenizer, tmp_path)]
    trainers.append(trainer_of(tokenizer, tmp_path, torch_compile=True, torch_compile_backend="aot_eager"))
    before = weights(trainers[0])
    for trainer in trainers:
        trainer.train()
    assert "Whole rows are computed in each step: it is compiled as a whole." in capsys.readouterr().out
    plain, compiled = map(weights, trainers)
    assert (compiled - plain).norm() <= 1e-4 * (plain - before).norm()


def test_the_second_epoch_runs_no_prefix(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path)
    trainer.train()
    store = trainer.reach.store
    assert len(store) == 2 * 22  # a prefix and a window of every row
    missed = store.missed
    trainer.train()
    assert store.missed == missed


def test_evaluation_of_the_loss_alone_is_in_part(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path)
    found = trainer.evaluate()["eval_loss"]
    assert trainer.reach._way.computed > 0
    trainer.reach = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found, rel=1e-5)


def test_predictions_and_metrics_have_their_logits(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, eval_strategy="epoch")
    trainer.compute_metrics = lambda found: {"width": found.predictions.shape[-1]}
    trainer.train()
    assert trainer.reach.describe().startswith("Each step leaves out ")
    assert [log["eval_width"] for log in trainer.state.log_history if "eval_width" in log] == [96] * 3
    predictions = trainer.predict(trainer.eval_dataset).predictions
    width = max(map(len, trainer.eval_dataset["input_ids"]))
    assert predictions.shape == (5, width, 96)


def test_the_trainer_of_transformers_with_a_callback(tokenizer, tmp_path):
    losses = []
    for in_part in (True, False):
        trainer = trainer_of(tokenizer, tmp_path, kind=Plain, eval_strategy="epoch", label_names=["labels"])
        trainer.compute_metrics = lambda found: {"width": found.predictions.shape[-1]}
        if in_part:
            trainer.add_callback(served := ReachCallback(trainer.model))
        trainer.train()
        logs = trainer.state.log_history
        assert [log["eval_width"] for log in logs if "eval_width" in log] == [96] * 3
        losses.append([log["loss"] for log in logs if "loss" in log])
    assert served.reach.store.missed == 2 * 22
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert trainer.model(**trainer.data_collator(list(examples().select(range(2))))).logits is not None


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_model_of_peft(tokenizer, tmp_path, capsys, task):
    config = pyreft.ReftConfig(layers=[1], positions="l1", low_rank_dimension=2, task_type=task, intervention="loreft")
    trainer = pyreft.ReftTrainer(
        model=peft.get_peft_model(tiny_llama(), config),
        args=TrainingArguments(output_dir=str(tmp_path), num_train_epochs=1, report_to="none", disable_tqdm=True),
        train_dataset=examples(),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    said = "Each step leaves out" if task else "Whole rows are computed in each step: a PeftModel without a task"
    assert said in capsys.readouterr().out


class WithLogits(pyreft.ReftTrainerForCausalLM):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        assert output.logits.shape[:2] == inputs["input_ids"].shape
        return (output.loss, output) if return_outputs else output.loss


def test_a_loss_of_ones_own_gets_what_the_model_returns(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, kind=WithLogits, max_steps=2)
    trainer.train()
    assert trainer.reach._way is None
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_reach_with_settings(tokenizer, tmp_path):
    model = adapt(tiny_llama(), positions="l1", layers=[1])
    reach = Reach(model, memory=0, directory=tmp_path / "held")
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none", disable_tqdm=True),
        train_dataset=examples(),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        reach=reach,
    )
    trainer.train()
    assert reach.store.on_disk == len(list((tmp_path / "held").iterdir())) > 0


def test_the_settings_of_a_job(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is a whale?", "completion": "🐳"}\n' * 3, encoding="utf-8")
    settings = {
        "data": data,
        "positions": "l1",
        "layers": "2",
        "epochs": 2,
        "reach_memory": "0",
        "output": tmp_path / "a",
    }
    result = PreparedJob(TrainingJob.from_settings(settings | {"reach_directory": tmp_path / "held"}, "test")).train()
    assert "in 0.0 of 0 MB, 2 more on disk." in result["computed"]  # one prefix, one window, three times
    whole = PreparedJob(
        TrainingJob.from_settings(settings | {"reach": False, "reach_memory": None, "output": tmp_path / "b"}, "test")
    ).train()
    assert whole["computed"] == "Whole rows are computed in each step."
    assert whole["loss"] == pytest.approx(result["loss"], rel=1e-4)
    with pytest.raises(pyreft.ReftError, match="memory: expected a number of bytes from 0 on"):
        PreparedJob(TrainingJob.from_settings(settings | {"reach_memory": "lots", "output": tmp_path / "c"}, "test"))
