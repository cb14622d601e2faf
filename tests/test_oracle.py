"""Parity with the original library: same weights in, same numbers out (see oracle/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pyreft

ORACLE = Path(__file__).parent / "oracle"
CASES = sorted(path.stem for path in ORACLE.glob("*.json") if path.stem != "intervention_locations")
LEGACY = sorted(path.name for path in (ORACLE / "legacy").iterdir())
# from the tensors of a case, and from the files that the original saved of it
WEIGHTS = [*((name, False) for name in CASES), *((name, True) for name in LEGACY)]


def read_case(name):
    case = json.loads((ORACLE / f"{name}.json").read_text())
    tensors = load_file(ORACLE / f"{name}.safetensors")
    loader = AutoModelForSequenceClassification if case["model"] == "roberta" else AutoModelForCausalLM
    return case, tensors, loader.from_pretrained(ORACLE / "models" / case["model"])


def load_case(name, legacy):
    case, tensors, model = read_case(name)
    if legacy:
        adapted = pyreft.ReftModel.load(ORACLE / "legacy" / name, model, act_fn=case["act_fn"] or "linear")
        return case, tensors, adapted, list(adapted.interventions.values())
    representations = [
        {
            "layer": place["layer"],
            "component": place["component"],
            "low_rank_dimension": case["low_rank_dimension"],
            "intervention": case["intervention"],
            "act_fn": case["act_fn"],
            "add_bias": "intervention.0.proj_layer.bias" in tensors,
        }
        for place in case["representations"]
    ]
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations)).eval()
    interventions = list(adapted.interventions.values())
    for index, intervention in enumerate(interventions):
        for key, value in tensors.items():
            name = key.removeprefix(f"intervention.{index}.")
            if name == "rotate_layer":
                intervention.rotate_layer.set_(value)
            elif name != key:
                intervention.get_parameter(name).data.copy_(value)
    return case, tensors, adapted, interventions


@pytest.mark.parametrize(("name", "legacy"), WEIGHTS)
def test_logits_loss_and_gradients(name, legacy):
    case, tensors, adapted, interventions = load_case(name, legacy)
    inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels")}
    output = adapted(**inputs, intervention_locations=tensors["locations"])
    real = tensors["attention_mask"].bool() if output.logits.dim() == 3 else slice(None)
    torch.testing.assert_close(output.logits[real], tensors["logits"][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss.item(), case["loss"], rtol=1e-5, atol=0)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**inputs).logits[real], tensors["base_logits"][real], atol=1e-5, rtol=0)
    output.loss.backward()
    for key, expected in tensors.items():
        if key.startswith("grad."):
            _, index, parameter = key.split(".", 2)
            actual = interventions[int(index)].get_parameter(parameter).grad
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), key
    assert adapted.count_parameters() == case["trainable"]


@pytest.mark.parametrize(("name", "legacy"), [pair for pair in WEIGHTS if not pair[0].startswith("roberta")])
def test_greedy_continuations(name, legacy):
    case, tensors, adapted, _ = load_case(name, legacy)
    expected, lengths = case["greedy_continuations"], case["prompt_lengths"]
    length = max(lengths)
    ids = tensors["input_ids"][:, :length]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    fixed = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for row, size in enumerate(lengths):
        at = {"sources->base": (None, tensors["locations"][row : row + 1].permute(1, 0, 2).tolist())}
        none, one = adapted.generate({"input_ids": ids[row : row + 1, :size]}, unit_locations=at, **fixed)
        assert none is None
        assert one[0, size:].tolist() == expected[row]
    batch = adapted.generate(input_ids=ids, attention_mask=mask, intervention_locations=tensors["locations"], **fixed)
    assert batch[:, length:].tolist() == expected


def test_intervention_locations():
    rows = json.loads((ORACLE / "intervention_locations.json").read_text())
    assert len(rows) == 384
    for row in rows:
        expected = row.pop("locations")
        assert pyreft.get_intervention_locations(**row) == expected, row
