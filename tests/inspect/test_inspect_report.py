"""The strength of edits, everything about an adapter at once, and what cannot be looked at."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import pyreft
from conftest import shaken
from inspected import QUESTIONS, ROWS, place, tiny_gpt2, train_small
from pyreft import pocket
from pyreft.data.files import read_examples
from pyreft.inspect import (
    answers_by_strength,
    edit_sizes,
    inspect_adapter,
    loss_by_strength,
    read_rows,
    record_edits,
    text_rows,
    written_directions,
)
from pyreft.jobs.demo import DATA


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of an adapter that answers in emojis."""
    return train_small(tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def loaded(trained):
    model, tokenizer = pocket.load()
    return pyreft.ReftModel.from_pretrained(model, trained), tokenizer


def test_the_loss_at_a_strength_is_that_of_edits_so_large():
    model = tiny_gpt2(place(1))
    rows = [{"input_ids": [5, 9, 40, 7], "labels": [-100, -100, 40, 7]}, {"input_ids": [3, 8], "labels": [-100, 8]}]
    strengths = [0, 0.5, 2]
    curve = loss_by_strength(model, rows, strengths, batch_size=1)
    assert curve.strengths == strengths
    (module,) = model.interventions.values()
    bias = module.bias.detach().clone()
    for strength, loss in zip(strengths, curve.losses, strict=True):
        module.bias.data.copy_(strength * bias)
        total = 0.0
        for row in rows:  # three tokens in all have a label
            with torch.no_grad():
                logits = model(**{key: torch.tensor([ids]) for key, ids in row.items()}).logits[0].log_softmax(-1)
            total -= sum(float(logits[at - 1, y]) for at, y in enumerate(row["labels"]) if y != -100)
        assert loss == pytest.approx(total / 3, rel=1e-4)
    module.bias.data.copy_(bias)
    assert loss_by_strength(model, rows, strengths, batch_size=2).losses == pytest.approx(curve.losses, rel=1e-4)


def test_no_dropout_falls_on_a_curve_or_an_answer():
    model = tiny_gpt2(place(1, "loreft", low_rank_dimension=2, dropout=0.5))
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 2 + row["input_ids"][2:]} for row in ROWS]
    tokenizer = pocket.load()[1]
    curve, answers = loss_by_strength(model, rows, [1, 2]), answers_by_strength(model, tokenizer, ROWS, [1, 2])
    model.train()
    assert loss_by_strength(model, rows, [1, 2]) == curve
    assert answers_by_strength(model, tokenizer, ROWS, [1, 2]) == answers
    assert model.training


def test_the_strength_turns_the_answer(loaded):
    model, tokenizer = loaded
    curve = loss_by_strength(model, read_rows(DATA, tokenizer), [0, 1])
    assert curve.losses[1] < curve.losses[0] / 5
    rows = text_rows(tokenizer, [example.prompt for example in read_examples(DATA)[:3]])
    seen = []
    found, (base, adapted) = answers_by_strength(
        model, tokenizer, rows, [0, 1], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        options = {"max_new_tokens": 32, "do_sample": False}
        with model.disable_adapter():
            plain = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
        edited = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
        assert found.answers[0][number] == tokenizer.decode(plain, skip_special_tokens=True)
        assert found.answers[1][number] == tokenizer.decode(edited, skip_special_tokens=True)
    assert not any(map(pocket.emojis_only, found.answers[0]))
    assert all(map(pocket.emojis_only, found.answers[1]))
    assert base.losses[0] < base.losses[1]
    assert adapted.losses[1] < adapted.losses[0]


# -- everything at once -----------------------------------------------------------------------------------------------


def test_all_of_it_as_plain_data(trained):
    told = []
    found = inspect_adapter(trained, data=DATA, compare=trained, most=3, strengths=[0, 1], progress=told.append)
    assert told == ["Loading the model", "Recording the edits", "Changing the strength", "Comparing"]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [p["layer"] for p in data["places"]] == [1, 2, 3]
    assert len(data["sizes"]) == len(data["prompts"]) == 3
    assert data["mean"]["labels"] == ["l4", "l3", "l2", "l1"]
    assert data["sizes"][0]["size"][0][0] is None
    assert data["curves"][0]["answers"] == "given answers"
    assert data["answers"] is None
    assert all(entry["overlap"] == pytest.approx(1, abs=1e-4) for entry in data["comparison"]["places"])


def nothing(prompt, input_ids):
    return prompt & False


def damaged(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"base_model_name_or_path": None}, {}, "does not say what its base model is; name it"),
        ({"base_model_name_or_path": "/no/such/model"}, {}, "is not there any more"),
        (
            {"positions": "nothing"},
            {},
            r"Text 1 has no edited token: of its \d+ tokens, the position rule chooses none",
        ),
        ({}, {"texts": []}, "Expected texts or a data file"),
        ({}, {"data": DATA}, "Expected texts or a data file"),
        ({}, {"texts": [], "data": "none.jsonl"}, "there is no such file"),
        ({}, {"compare": "nowhere"}, "expected an adapter's directory"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(trained, tmp_path, monkeypatch, changes, arguments, message):
    pyreft.positions.register_rule("nothing", nothing)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    damaged(tmp_path, **changes)
    monkeypatch.setattr("pyreft.inspect.report.load_adapted", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(pyreft.ReftError, match=message):
        inspect_adapter(tmp_path, **{"texts": QUESTIONS, **arguments})


def test_adapters_of_different_models_are_not_compared(trained, tmp_path):
    other = tiny_gpt2(place(1))
    other.save(tmp_path)
    with pytest.raises(pyreft.ReftError, match=r"its base model has .*model_type 'gpt2' instead of 'llama', num"):
        inspect_adapter(trained, texts=QUESTIONS, compare=tmp_path)


def test_an_encoder_is_told_before_it_is_loaded(tmp_path, monkeypatch):
    config = BertConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(tmp_path / "base")
    pocket.load()[1].save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    pyreft.get_reft_model(base, pyreft.ReftConfig(layers=[1], positions="f1", intervention="loreft")).save(
        tmp_path / "adapter"
    )
    monkeypatch.setattr("pyreft.inspect.report.load_adapted", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(pyreft.ReftError, match="holds a BertModel, which has no unembedding"):
        inspect_adapter(tmp_path / "adapter", texts=QUESTIONS)


def test_a_text_longer_than_the_context_is_told(trained):
    with pytest.raises(pyreft.ReftError, match="with room for an answer of 32, the model's context 256; shorten it"):
        inspect_adapter(trained, texts=["cat " * 230])


def test_models_that_cannot_be_looked_at():
    bert = BertModel(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    encoder = shaken(pyreft.get_reft_model(bert, pyreft.ReftConfig(layers=[1], positions="f1", intervention="bias")))
    recorded = record_edits(encoder, ROWS)
    assert edit_sizes(recorded, pocket.load()[1]).size.isfinite().sum() == 1  # sizes need no unembedding
    with pytest.raises(pyreft.ReftError, match="BertModel has no unembedding"):
        written_directions(encoder, pocket.load()[1], recorded)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    both = pyreft.get_reft_model(
        t5, pyreft.ReftConfig(layers=[1], positions="f1", low_rank_dimension=2, intervention="loreft")
    )
    with pytest.raises(pyreft.ReftError, match="a model with an encoder and a decoder cannot be looked at yet"):
        record_edits(both, ROWS)


def test_what_is_not_there_to_record():
    model = tiny_gpt2(place(1))
    with pytest.raises(pyreft.ReftError, match=r"one of the active adapters \(default\), got 'second'"):
        record_edits(model, ROWS, adapter_name="second")
    with model.disable_adapter(), pytest.raises(pyreft.ReftError, match="there is none"):
        record_edits(model, ROWS)
    with pytest.raises(pyreft.ReftError, match="There is no text to look at"):
        record_edits(model, [])
    with pytest.raises(pyreft.ReftError, match="row: expected 0 to 2, got 3"):
        edit_sizes(record_edits(model, ROWS), None, 3)
    with pytest.raises(pyreft.ReftError, match="expected rows with answers"):
        loss_by_strength(model, ROWS)
    with pytest.raises(pyreft.ReftError, match="strengths: expected finite numbers, got 0, nan"):
        loss_by_strength(model, ROWS, [0, float("nan")])
    without = tiny_gpt2({"layer": 1, "intervention": "bias"})
    with pytest.raises(pyreft.ReftError, match="The adapter has no position rule"):
        record_edits(without, ROWS)
