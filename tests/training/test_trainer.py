"""The trainers: columns that say where to edit, checkpoints that are complete adapters, resume."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import pyreft
from conftest import FORMULAS, tiny_llama
from pyreft import pocket

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pocket.load()[1]


def examples(locations):
    """A task with an answer that the prompt alone does not tell: the id after the prompt is always 7."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 96, (n % 5 + 2,), generator=generator).tolist() for n in range(16)]
    columns = {"input_ids": [p + [7, 8] for p in prompts], "labels": [[-100] * len(p) + [7, 8] for p in prompts]}
    if locations:
        columns["intervention_locations"] = [[[len(p) - 1]] * 4 for p in prompts]
    return Dataset.from_dict(columns)


def arguments(directory, **changes):
    defaults = {
        "output_dir": str(directory),
        "num_train_epochs": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "save_steps": 6,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**defaults | changes)


def trained(tokenizer, directory, locations=False, resume=None, dropout=0.0, **changes):
    torch.manual_seed(1)
    config = pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft", dropout=dropout)
    adapted = pyreft.get_reft_model(tiny_llama(), config)
    trainer = pyreft.ReftTrainerForCausalLM(
        model=adapted,
        tokenizer=tokenizer,
        args=arguments(directory, **changes),
        train_dataset=examples(locations),
        eval_dataset=examples(locations),
        data_collator=pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapted


def weights(adapted):
    return [p.detach() for p in adapted.parameters() if p.requires_grad]


def test_a_rule_and_its_locations_train_the_same(tokenizer, tmp_path):
    by_rule, first = trained(tokenizer, tmp_path / "rule")
    by_locations, second = trained(tokenizer, tmp_path / "locations", locations=True)
    for one, other in zip(weights(first), weights(second), strict=True):
        assert torch.equal(one, other)
    losses = [entry["loss"] for entry in by_rule.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert by_rule.evaluate()["eval_loss"] == by_locations.evaluate()["eval_loss"]


def test_a_checkpoint_is_an_adapter_and_training_goes_on_from_it(tokenizer, tmp_path):
    _, whole = trained(tokenizer, tmp_path / "whole")
    half = tmp_path / "whole" / "checkpoint-6"
    assert pyreft.ReftModel.load(half, tiny_llama()).count_parameters() == whole.count_parameters()
    _, resumed = trained(tokenizer, tmp_path / "resumed", resume=str(half))
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_on_the_way_does_not_change_what_dropout_draws(tokenizer, tmp_path):
    alone, watched, plain = (
        weights(trained(tokenizer, tmp_path / str(number), num_train_epochs=2, **settings)[1])
        for number, settings in enumerate(
            ({"dropout": 0.5}, {"dropout": 0.5, "eval_strategy": "steps", "eval_steps": 1}, {})
        )
    )
    assert all(map(torch.equal, alone, watched))
    assert not all(map(torch.equal, alone, plain))


def test_a_second_training_into_the_same_directory_replaces_its_checkpoints(tokenizer, tmp_path):
    trained(tokenizer, tmp_path, num_train_epochs=3)
    trainer, second = trained(tokenizer, tmp_path, num_train_epochs=3, learning_rate=0.1)
    trainer.save_model()
    for directory in (tmp_path, tmp_path / "checkpoint-6"):
        loaded = pyreft.ReftModel.load(directory, tiny_llama())
        assert loaded.peft_config["default"].positions == "l1"
        for one, other in zip(weights(second), weights(loaded), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("number", [1, 3])
def test_a_wrong_number_of_interventions_is_told_in_training(tokenizer, tmp_path, number):
    prompts, answers = [pocket.PROMPT_TEMPLATE % "Why?"] * 2, ["So.", "Thus."]
    config = pyreft.ReftConfig(layers=[1, 2], positions="l1", low_rank_dimension=4, intervention="loreft")
    trainer = pyreft.ReftTrainerForCausalLM(
        model=pyreft.get_reft_model(pocket.load()[0], config),
        tokenizer=tokenizer,
        args=arguments(tmp_path),
        **pyreft.make_last_position_supervised_data_module(tokenizer, None, prompts, answers, num_interventions=number),
    )
    with pytest.raises(pyreft.ReftError, match=f"'default' has 2 interventions, locations came for {number}"):
        trainer.train()


def test_locations_for_a_model_without_edits_are_told(tokenizer, tmp_path):
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, ["Why?"], ["So."])
    trainer = pyreft.ReftTrainerForCausalLM(model=pocket.load()[0], args=arguments(tmp_path), **module)
    with pytest.raises(
        pyreft.ReftError, match="locations came for a LlamaForCausalLM without edits, which would leave"
    ):
        trainer.train()


def test_transformers_own_trainer_takes_an_adapted_model(tokenizer, tmp_path):
    adapted = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft")
    )
    trainer = Trainer(
        model=adapted,
        args=arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True),
        train_dataset=examples(False),
        eval_dataset=examples(False),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    best = pyreft.ReftModel.load(trainer.state.best_model_checkpoint, tiny_llama())
    for one, other in zip(weights(adapted), weights(best), strict=True):
        assert torch.equal(one, other)


def test_the_original_s_signature_of_compute_loss(tokenizer, tmp_path):
    class Halved(pyreft.ReftTrainerForCausalLMDistributed):
        def compute_loss(self, intervenable, inputs, return_outputs=False):
            assert "id" not in inputs
            output = intervenable(**inputs)
            return (output.loss / 2, output) if return_outputs else output.loss / 2

    rows = examples(True).add_column("id", list(range(16)))
    trainer = Halved(
        model=pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft")
        ),
        tokenizer=tokenizer,
        args=arguments(tmp_path, num_train_epochs=1, remove_unused_columns=False, gradient_accumulation_steps=2),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer)),
    )
    trainer.train()
    losses = []
    for part in (range(8), range(8, 16)):
        batch = trainer.data_collator([rows[i] for i in part])
        batch.pop("id")
        with torch.no_grad():
            losses.append(float(trainer.model.eval()(**batch).loss))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


class OfTheOriginal(pyreft.ReftModel):
    """A subclass as programs for the original write it: `forward` has its arguments, and returns its pair."""

    def __init__(self, reft_config, model):
        super().__init__(reft_config, model)
        self.seen = []

    def forward(
        self, base, sources=None, unit_locations=None, source_representations=None, subspaces=None, labels=None
    ):
        self.seen.append((set(base) & {"input_ids", "labels"}, unit_locations))
        return None, super().forward(base, sources, unit_locations, source_representations, subspaces, labels)[1]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_model_with_a_forward_in_the_originals_manner(tokenizer, tmp_path, accumulated):
    places = [{"layer": layer, "component": "block_output", "low_rank_dimension": 4} for layer in range(4)]
    rows, found = examples(True), []
    for cls in (OfTheOriginal, pyreft.ReftModel):
        torch.manual_seed(1)
        model = cls(pyreft.ReftConfig(representations=places), tiny_llama())
        trainer = pyreft.ReftTrainerForCausalLM(
            model=model,
            tokenizer=tokenizer,
            args=arguments(tmp_path, max_steps=3, save_strategy="no", gradient_accumulation_steps=accumulated),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=pyreft.ReftDataCollator(DataCollatorForSeq2Seq(tokenizer)),
        )
        result = trainer.train()
        found.append((result.training_loss, trainer.evaluate()["eval_loss"]))
        if cls is OfTheOriginal:
            (inputs, locations), *_ = model.seen
            assert inputs == {"input_ids"}
            assert [len(part) for part in locations["sources->base"][1]] == [8] * 4
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_trained_parameters_that_no_adapter_holds_are_told(tmp_path):
    adapted = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft")
    )
    adapted.model.model.norm.weight.requires_grad = True
    with pytest.warns(UserWarning, match=r"1 trained parameters of the base model, such as model\.norm\.weight"):
        adapted.save(tmp_path / "saved")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_penalties_join_the_loss(model, tmp_path, accumulated):
    """One step of SGD on a batch, and on its halves, moves by the gradients of the loss plus the penalty."""
    settings = {"layers": [1], "positions": "l1", "intervention": "lofit", "intervention_kwargs": {"l1": 0.5}}
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(**settings))
    (intervention,) = adapted.interventions.values()
    torch.nn.init.normal_(intervention.scale)
    start = intervention.scale.detach().clone()
    ids = torch.randint(3, 96, (4, 6))
    rows = [{"input_ids": row, "labels": torch.tensor([-100] * 3 + row[3:])} for row in ids.tolist()]
    loss = adapted(ids, labels=torch.stack([row["labels"] for row in rows])).loss + 0.5 * intervention.scale.abs().sum()
    (gradient,) = torch.autograd.grad(loss, intervention.scale)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
    )
    pyreft.ReftTrainer(model=adapted, args=arguments, train_dataset=rows).train()
    torch.testing.assert_close(intervention.scale.detach(), start - 0.1 * gradient, atol=1e-6, rtol=1e-5)


def tiny_bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=96, initializer_range=0.2, **sizes))


@pytest.mark.parametrize("active", [["default"], ["second"], ["second", "default"]])
def test_the_best_of_each_active_adapter_is_loaded(tokenizer, tmp_path, active):
    """They are alike, so the files of one would fit another."""
    config = {"positions": "l1", "low_rank_dimension": 4, "intervention": "loreft"}
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**config))
    adapted.add_adapter("second", pyreft.ReftConfig(**config))
    adapted.base_model.set_adapter(active)
    data = examples(False)
    early = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    trainer = pyreft.ReftTrainer(
        model=adapted,
        args=arguments(tmp_path, load_best_model_at_end=True, **early),  # the highest loss: the first epoch
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < max(losses) - 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-4)


def told_of_unreached(model, directory, length=24, **settings):
    """What is told of edits without a gradient, in a training of two steps."""
    rows = torch.randint(5, 90, (8, length)).tolist()
    config = pyreft.ReftConfig(**{"intervention": "loreft", "positions": "l16"} | settings)
    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=pyreft.get_reft_model(model, config),
        args=arguments(directory, max_steps=2, per_device_train_batch_size=4),
        train_dataset=[{"input_ids": row, "labels": number % 2} for number, row in enumerate(rows)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught if "got no gradient" in str(warning.message)]


def test_edits_that_the_head_of_a_classifier_does_not_read_are_told(tmp_path):
    (message,) = told_of_unreached(tiny_bert(), tmp_path)
    assert message.startswith("1 of 3 edits got no gradient from the first step (layer 2, positions l16): the head")
    assert "such as 'f1+l16'" in message
    assert not told_of_unreached(tiny_bert(), tmp_path, positions="f1+l16")
    assert not told_of_unreached(tiny_bert(), tmp_path, positions=None)  # the default: all of them
    assert not told_of_unreached(tiny_bert(), tmp_path, length=10)  # all of the row
    decoder = LlamaForSequenceClassification(tiny_llama().config)
    assert not told_of_unreached(decoder, tmp_path)  # it reads the last token
    assert "layer 3, positions f1)" in told_of_unreached(decoder, tmp_path, positions="f1")[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_formula_begins_without_a_gradient(tmp_path, name):
    assert not told_of_unreached(tiny_bert(), tmp_path, positions="f1+l16", intervention=name)
    assert len(told_of_unreached(tiny_bert(), tmp_path, intervention=name)) == 1
