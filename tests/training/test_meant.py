"""What is learned is what was meant; where it cannot be, it is told."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import pyreft
from conftest import tiny_llama
from pyreft import pocket
from pyreft.reach import Reach
from pyreft.tuner import hooks

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11], [1, 15, 16, 17, 18, 0, 0, 0]])
MASK = (IDS != 0).long()
EVERY = IDS.masked_fill(IDS == 0, -100)
ONE = EVERY.masked_fill(torch.arange(8) < 3, -100)
SEVERAL = ONE.masked_fill(torch.arange(8) == 5, -100)


def adapted(**changes):
    settings = {
        "intervention": "loreft",
        "layers": [2],
        "positions": "l2",
        "low_rank_dimension": 2,
        "task_type": "CAUSAL_LM",
    }
    return pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**settings | changes)).train()


def told(call, labels, times=2):
    """What is said of prompts and labels when a batch is trained on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
    return [str(w.message) for w in caught if "labels" in str(w.message)]


@pytest.mark.parametrize("way", ["model", "reach"])
def test_labels_without_a_prompt_are_told_once(way):
    model = adapted()
    (message,) = told(model if way == "model" else Reach(model), EVERY)
    for name in ("no prompt is found", "completion_only_loss", "assistant_only_loss", 'positions="all"', "edits"):
        assert name in message


@pytest.mark.parametrize("way", ["model", "reach"])
def test_several_answers_in_a_row_are_told_once(way):
    model = adapted()
    (message,) = told(model if way == "model" else Reach(model), SEVERAL)
    assert "Only the prompt before the first is edited" in message
    assert "Give each answer a row of its own" in message


@pytest.mark.parametrize("way", ["model", "reach"])
def test_packed_examples_are_not_several_answers_to_one_prompt(way):
    model = adapted()
    ids = torch.tensor([[1, 5, 6, 7, 1, 15, 16]])
    labels = torch.tensor([[-100, -100, 6, 7, -100, -100, 16]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        (model if way == "model" else Reach(model))(
            input_ids=ids, labels=labels, position_ids=positions, use_cache=False
        )


@pytest.mark.parametrize(("positions", "labels"), [("l2", ONE), ("all", EVERY), ("all", SEVERAL)])
def test_what_needs_no_word(positions, labels):
    assert told(adapted(positions=positions), labels) == []


def test_an_evaluation_is_not_training():
    model = adapted().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, attention_mask=MASK, labels=EVERY)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*(gradient|activation)_checkpointing.*:FutureWarning")
def test_trl_on_every_token_is_told(tmp_path):
    import trl
    from datasets import Dataset

    model, tokenizer = pocket.load()
    pairs = pocket.emoji_pairs()[:2]
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=trl.SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False),
        train_dataset=Dataset.from_dict(
            {"text": [pocket.PROMPT_TEMPLATE % p["prompt"] + p["completion"] for p in pairs]}
        ),
        peft_config=pyreft.ReftConfig(layers=[3], positions="l4", low_rank_dimension=2, intervention="loreft"),
    )
    with pytest.warns(UserWarning, match="no prompt is found in it.*completion_only_loss"):
        trainer.train()


def test_a_plain_collator_for_language_models_is_told():
    tokenizer = pocket.load()[1]
    rows = [tokenizer("What is a cat? A cat.")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    model = pyreft.get_reft_model(
        pocket.load()[0], pyreft.ReftConfig(layers=[3], low_rank_dimension=2, intervention="loreft")
    ).train()
    with pytest.warns(UserWarning, match="no prompt is found"):
        model(**batch)


def mean_loss(outputs, labels, num_items_in_batch=None):
    """The model's own, for a Trainer that takes the labels off the call."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class PopsLabels(pyreft.ReftTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return (mean_loss(outputs, labels), outputs) if return_outputs else mean_loss(outputs, labels)


def losses_of_trainer(kind, tmp_path, options, **settings):
    model = adapted()
    names = {"input_ids": IDS, "attention_mask": MASK, "labels": ONE}
    rows = [{name: values[row] for name, values in names.items()} for row in range(2)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.1, per_device_train_batch_size=2, report_to="none",
        label_names=["labels"], use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=3, **settings,
    )  # fmt: skip
    trainer = kind(model, args, train_dataset=rows, eval_dataset=rows, **options)
    trainer.train()
    return [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log] + [
        p.detach() for p in model.parameters() if p.requires_grad
    ]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(pyreft.ReftTrainer, {"compute_loss_func": mean_loss}), (PopsLabels, {})],
    ids=["loss function", "labels taken off"],
)
def test_a_loss_that_takes_the_labels_leaves_the_edits_in_the_prompt(kind, options, tmp_path):
    expected = losses_of_trainer(pyreft.ReftTrainer, tmp_path, {"reach": False})
    found = losses_of_trainer(kind, tmp_path, options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_label_smoothing_leaves_the_edits_in_the_prompt(tmp_path, monkeypatch):
    seen = []
    resolve = hooks.resolve

    def noting(*args, **kwargs):
        located = resolve(*args, **kwargs)
        seen.extend(mask.tolist() for mask in located.masks.values())
        return located

    monkeypatch.setattr(hooks, "resolve", noting)
    losses_of_trainer(pyreft.ReftTrainer, tmp_path, {"reach": False}, label_smoothing_factor=0.1)
    assert len(seen) == 4  # with the evaluation
    assert all(mask == [[False, True, True, *[False] * 5]] * 2 for mask in seen)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_plain_trainer_that_takes_the_labels_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"came without labels.*label_smoothing_factor.*; pyreft.ReftTrainer does not"):
        losses_of_trainer(Trainer, tmp_path, {}, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("positions", "given"),
    [("f2", {}), ("all", {}), ("l2", {"prompt_lengths": [2, 3]}), ("l2", {"intervention_locations": [[[1]], [[2]]]})],
)
def test_where_no_labels_are_needed(positions, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(positions=positions)(input_ids=IDS, attention_mask=MASK, **given)


# -- heads and embeddings -----------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("named", [None, ["score"]])
def test_the_head_of_a_classifier_is_trained_and_saved(tmp_path, named):
    config = pyreft.ReftConfig(
        layers=[1],
        positions="l1",
        low_rank_dimension=4,
        task_type="SEQ_CLS",
        modules_to_save=named,
        intervention="loreft",
    )
    model = pyreft.get_reft_model(classifier(), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "reft" not in name]
    assert trained == ["base_model.model.score.modules_to_save.default.weight"]
    model(IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.1 * parameter.grad)
    model.save_pretrained(tmp_path)
    wanted = model.eval()(IDS, attention_mask=MASK).logits
    for load in (peft.PeftModel.from_pretrained, pyreft.ReftModel.from_pretrained):
        torch.manual_seed(1)
        assert torch.equal(load(classifier(), tmp_path).eval()(IDS, attention_mask=MASK).logits, wanted)


def test_resized_embeddings_are_saved_only_if_asked_for(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100)
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(layers=[1], low_rank_dimension=2, intervention="loreft"))
    with pytest.warns(UserWarning, match=r"The embeddings have 100 rows, those of .*base 96. They are not saved with"):
        model.save(tmp_path / "plain")
    assert all("reft_" in name for name in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "whole" / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "none", save_embedding_layers=False)
    again = type(base).from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(100)
    loaded = pyreft.ReftModel.from_pretrained(again, tmp_path / "plain")
    assert torch.equal(*(next(iter(m.interventions.values())).learned_source.weight for m in (loaded, model)))
    pyreft.ReftModel.from_pretrained(again, tmp_path / "whole")
    assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)


# -- models that come anew ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_is_made_anew_is_computed_in_part(tmp_path, own):
    tokenizer = pocket.load()[1]
    rows = [{"input_ids": [1, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8]}] * 4

    def init():
        torch.manual_seed(0)
        return adapted()

    trainer = pyreft.ReftTrainer(
        model_init=init,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        reach=Reach(init(), memory="7MB") if own else True,
    )
    first = trainer.reach
    for _ in range(2):
        trainer.train()
        assert trainer.reach is not first
        assert trainer.reach.model is trainer.model
        assert "Each step leaves out" in trainer.reach.describe()
        assert trainer.reach.memory == ("7MB" if own else None)


# -- states without tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "l1", "f1"])
def test_a_plain_network_has_one_token_in_each_row(positions):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    place = {"component": "0.output", "low_rank_dimension": 2, "positions": positions}
    model = peft.get_peft_model(net, pyreft.ReftConfig(representations=place))
    (edit,) = (module for module in model.modules() if isinstance(module, pyreft.LoreftIntervention))
    x = torch.randn(3, 8)
    with torch.no_grad():
        edit.learned_source.bias.fill_(2.0)
        wanted = net[2](torch.relu(edit(torch.nn.functional.linear(x, net[0].weight, net[0].bias))))
        torch.testing.assert_close(model(x), wanted)
