"""What the original computed: its cases, read for the tests of numbers and of files (see oracle/README.md)."""

import json
from pathlib import Path

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
