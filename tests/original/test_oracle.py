"""Parity with the original library: same weights in, same numbers out (see oracle/README.md)."""

import json

import pytest
import torch

import pyreft
from oracle_cases import ORACLE, WEIGHTS, load_case


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
