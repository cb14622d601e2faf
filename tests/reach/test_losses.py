"""The loss is the one that the user gave, whichever way it was given; its gradients, too."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss import loss_utils

import pyreft
from architectures import ARCHITECTURES
from conftest import tiny_llama
from pyreft.reach import Reach, ReachCallback
from pyreft.reach.layers import SkipLayers
from pyreft.reach.prefixes import SkipPrefixes
from reaching import adapt, assert_exact, assert_same, batch_of, loss_and_gradients, rows_of

BATCH = batch_of(rows_of(14, 9, 11), "left", [2, 6, 4])  # rows with other numbers of labels


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def mean_of_rows(logits, labels, vocab_size, **_):
    each = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return (each.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def weight_on_a_token(logits, labels, vocab_size, **_):
    weight = torch.ones(vocab_size, dtype=logits.dtype)
    weight[int(BATCH["labels"][1, -1])] = 5
    return cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), weight=weight)


def of_unlabelled_tokens(logits, labels, vocab_size, **_):
    return logits.logsumexp(-1).pow(2).mean()


def with_another_ignored_label(logits, labels, vocab_size, **_):
    ignored = int(BATCH["labels"][1, -1])
    return loss_utils.ForCausalLMLoss(logits, labels.where(labels != -100, ignored), vocab_size, ignore_index=ignored)


class Own(LlamaForCausalLM):
    """A language model whose forward gives another loss."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        if output.loss is not None:
            output.loss = mean_of_rows(output.logits, kwargs["labels"], 96)
        return output


def smoothed(source, target, num_items_in_batch=None, ignore_index=-100, **_):
    return cross_entropy(source, target, ignore_index=ignore_index, label_smoothing=0.1)


def on_the_model(base, patch):
    base.loss_function = mean_of_rows


def on_the_class(base, patch):
    patch.setattr(LlamaForCausalLM, "loss_function", staticmethod(weight_on_a_token), raising=False)


def by_type(base, patch):
    base.loss_type = "ForMaskedLM"


def in_the_table(base, patch):
    patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", of_unlabelled_tokens)


def ignoring_another_label(base, patch):
    base.loss_function = with_another_ignored_label


def below_the_loss(base, patch):
    patch.setattr(loss_utils, "fixed_cross_entropy", smoothed)


WAYS = [on_the_model, on_the_class, by_type, in_the_table, ignoring_another_label, below_the_loss]


@pytest.mark.parametrize("layers", [[0], [2]], ids=str)
@pytest.mark.parametrize("component", ["block_input", "block_output"])
@pytest.mark.parametrize("give", WAYS, ids=lambda give: give.__name__)
def test_a_loss_of_ones_own(give, layers, component, monkeypatch):
    """Given after the first step, taken back, and there from the beginning of another."""
    adapted = adapt(tiny_llama().double(), layers=layers, component=component)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    before = loss_and_gradients(reach, adapted, BATCH)
    with monkeypatch.context() as patch:
        give(adapted.get_base_model(), patch)
        expected = loss_and_gradients(adapted, adapted, BATCH)
        assert abs(expected[0] - before[0]) > 1e-3
        for each in (reach, Reach(adapted)):
            for _ in range(2):
                assert_same(loss_and_gradients(each, adapted, BATCH), expected, 1e-9)
            assert not isinstance(each._way, SkipPrefixes)
    for name in ("_loss_function", "loss_type"):
        vars(adapted.get_base_model()).pop(name, None)
    adapted.get_base_model().loss_type = "ForCausalLM"
    assert_same(loss_and_gradients(reach, adapted, BATCH), before, 1e-9)
    assert isinstance(reach._way, SkipPrefixes)


@pytest.mark.parametrize("layers", [[0], [2]], ids=str)
def test_a_subclass_with_another_loss(layers):
    config = tiny_llama().config
    torch.manual_seed(0)
    adapted = adapt(Own(LlamaConfig(**config.to_dict())).eval().double(), layers=layers)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert type(reach._way) is SkipLayers


def test_why_a_loss_of_ones_own_is_computed_in_whole_rows():
    adapted = adapt(tiny_llama().double(), layers=[0], component="block_input")
    adapted.get_base_model().loss_function = mean_of_rows
    reach = Reach(adapted)
    reach(**BATCH)
    assert reach.why_not == "LlamaForCausalLM has a loss function of its own"
    assert reach.describe() == f"Whole rows are computed in each step: {reach.why_not}."


def test_layers_are_left_out_under_a_loss_of_ones_own():
    adapted = adapt(tiny_llama().double(), layers=[2])
    adapted.get_base_model().loss_function = mean_of_rows
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    why = "LlamaForCausalLM has a loss function of its own"
    assert reach.describe().startswith(f"Each step leaves out 3 of 4 layers and no tokens ({why}), held are 3 prefixes")
    assert reach.log_probs(**BATCH).shape == BATCH["labels"][:, 1:].shape


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "LLaVA", "Bloom", "Mixtral"])
def test_transformers_own_loss_is_known(name):
    base = next(one for one in ARCHITECTURES if one.name == name).make()
    adapted = adapt(base)
    reach = Reach(adapted)
    reach(**BATCH)
    assert type(reach._way) is SkipPrefixes


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)], ids=str)
def test_the_number_of_items(count):
    adapted = adapt(tiny_llama().double())
    reach, batch = Reach(adapted), BATCH | {"num_items_in_batch": count}
    for each in (batch, BATCH, batch):
        expected = adapted(**each).loss
        torch.testing.assert_close(reach(**each).loss, expected, rtol=1e-9, atol=0)
    assert type(reach._way) is SkipPrefixes


@pytest.mark.parametrize(
    "more",
    [
        {"shift_labels": torch.nn.functional.pad(BATCH["labels"][:, 1:], (0, 1), value=5)},
        {"ignore_index": 7, "labels": BATCH["labels"].masked_fill(BATCH["labels"] == -100, 7)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_goes_to_the_loss_with_the_call(more):
    adapted = adapt(tiny_llama().double())
    reach = Reach(adapted)
    reach(**BATCH)
    batch = BATCH | more
    assert_same(loss_and_gradients(reach, adapted, batch), loss_and_gradients(adapted, adapted, batch), 0)
    assert reach.why_not == f"the call has {next(iter(more))}"


def rows():
    return [
        {name: values[row][BATCH["attention_mask"][row].bool()].tolist() for name, values in BATCH.items()}
        for row in range(3)
    ]


def collate(some):
    width = max(len(row["input_ids"]) for row in some)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in some]) for name in fill}


def half_of_the_squares(outputs, labels, num_items_in_batch=None):
    return outputs.logits[labels != -100].pow(2).mean() / 2


@pytest.mark.parametrize("kind", ["ReftTrainer", "Trainer"])
@pytest.mark.parametrize(
    ("arguments", "settings"),
    [({}, {"label_smoothing_factor": 0.2}), ({"compute_loss_func": half_of_the_squares}, {}), ({}, {})],
    ids=["label smoothing", "loss function", "plain"],
)
def test_the_loss_of_a_trainer(kind, arguments, settings, tmp_path):
    """Both trainers step as the plain one does, in part only where the loss is the model's."""
    weights = []
    for in_part in (False, True):
        adapted = adapt(tiny_llama().double(), layers=[1])
        args = TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=0.1, optim="sgd", report_to="none", disable_tqdm=True,
            use_cpu=True, label_names=["labels"], **settings,
        )  # fmt: skip
        own = {"reach": in_part} if kind == "ReftTrainer" else {}
        trainer = (pyreft.ReftTrainer if own else Trainer)(
            adapted, args, train_dataset=rows(), data_collator=collate, **own, **arguments
        )
        if in_part and not own:
            trainer.add_callback(callback := ReachCallback(adapted))
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in adapted.parameters() if p.requires_grad]))
    reach = trainer.reach if own else callback.reach
    assert (reach.why_not is None) is not (arguments or settings)
    torch.testing.assert_close(*weights, rtol=1e-7, atol=1e-9)
