import pytest
import torch

import pyreft
from pyreft import pocket
from pyreft.data.spans import encode_spans, make_span_supervised_data_module, read_spans


@pytest.fixture(scope="module")
def base():
    return pocket.load()


def edited_text(tokenizer, batch, row, intervention=0):
    at = [place for place in batch["intervention_locations"][row][intervention].tolist() if place >= 0]
    return tokenizer.decode(batch["input_ids"][row][at])


@pytest.mark.parametrize("markers", [("[[", "]]"), ("<e>", "</e>"), ("|", "~")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_marked_spans_are_located_and_the_markers_removed(base, markers, side):
    _, tokenizer = base
    tokenizer.padding_side = side
    left, right = markers
    texts = [f"What is {left}a whale{right}?", f"{left}Where{right} would I see an {left}oak tree{right} today?"]
    plain = ["What is a whale?", "Where would I see an oak tree today?"]
    batch = encode_spans(tokenizer, texts, markers=markers)
    assert torch.equal(batch["input_ids"], tokenizer(plain, padding=True, return_tensors="pt")["input_ids"])
    assert edited_text(tokenizer, batch, 0).strip() == "a whale"
    assert edited_text(tokenizer, batch, 1).split() == ["Where", "oak", "tree"]
    by_characters = encode_spans(tokenizer, plain, spans=[[(8, 15)], [(0, 5), (21, 29)]])
    assert torch.equal(by_characters["intervention_locations"], batch["intervention_locations"])


def test_each_intervention_may_have_its_own_span(base):
    _, tokenizer = base
    batch = encode_spans(tokenizer, ["Is [[a whale]] like [[an oak]]?"], num_interventions=3, span_of=[1, 0, 1])
    found = [edited_text(tokenizer, batch, 0, intervention).strip() for intervention in range(3)]
    assert found == ["an oak", "a whale", "an oak"]


def test_spans_reach_the_model_in_calls_generation_and_training(base, tmp_path):
    model, tokenizer = base
    tokenizer.padding_side = "left"
    place = {"layer": 2, "component": "block_output", "intervention": "loreft", "low_rank_dimension": 4}
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place)).eval()
    batch = encode_spans(tokenizer, ["What is [[a whale]]?", "Where can I see [[an oak]]?"])
    states = adapted(**batch, output_hidden_states=True).hidden_states[3]
    with adapted.disable_adapter():
        before = adapted(**batch, output_hidden_states=True).hidden_states[3]
    expected = torch.zeros(states.shape[:2], dtype=torch.bool)
    for row, places in enumerate(batch["intervention_locations"][:, 0]):
        expected[row, places[places >= 0]] = True
    assert torch.equal((states != before).any(-1), expected)
    assert adapted.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    tokenizer.padding_side = "right"
    data_module = make_span_supervised_data_module(
        tokenizer, model, ["What is [[a whale]]?", "Where can I see [[an oak tree]]?"], ["AHOY!", "AHOY AHOY!"]
    )
    rows = data_module["data_collator"](list(data_module["train_dataset"]))
    assert edited_text(tokenizer, rows, 1).strip() == "an oak tree"
    losses = []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(10):
        loss = adapted(**rows).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("What is [[a whale?", {}, "Expected each '[[' to be followed by one ']]'"),
        ("What is [[a [[whale]]?", {}, "Expected each '[[' to be followed by one ']]'"),
        ("What is a whale]]?", {}, "Expected a '[[' before each ']]'"),
        ("What is a whale?", {}, "Expected at least one span with tokens in it, got []"),
        ("What is [[]] a whale?", {}, "Expected at least one span with tokens in it, got [(8, 8)]"),
        ("What is [[a]] whale?", {"span_of": [1]}, "the number of one of 1 spans, got [1]"),
        ("What is a whale?", {"spans": []}, "spans: expected a list for each of the 1 texts, got 0."),
    ],
)
def test_wrong_spans(base, text, options, message):
    with pytest.raises(pyreft.ReftError) as caught:
        encode_spans(base[1], [text], **options)
    assert message in str(caught.value)


def test_reading_spans():
    assert read_spans("a {b} {c}d", ("{", "}")) == ("a b cd", [(2, 3), (4, 5)])
