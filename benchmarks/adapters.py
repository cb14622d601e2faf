"""A batch in which every row has its own adapter, out of many in memory: against the base model, and LoRA beside it.

python benchmarks/adapters.py
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import pyreft
from _common import paired, ratio, report
from generate import random_llama, reft
from pyreft.tuner import reft_layers


def many(model: Any, config: Any, count: int) -> Any:
    """A model with as many adapters `a0`, `a1`, ..."""
    adapted = get_peft_model(model, copy.deepcopy(config), "a0")
    if not isinstance(config, pyreft.ReftConfig):
        for number in range(1, count):
            adapted.add_adapter(f"a{number}", copy.deepcopy(config))
        return adapted.eval()
    # what add_adapter does, without its walks over all modules, whose number grows with the adapters
    locator = adapted.base_model._locator
    for number in range(1, count):
        name = f"a{number}"
        for layer in reft_layers(adapted):
            for index, intervention in layer.of("a0"):
                layer.add_intervention(name, index, copy.deepcopy(intervention))
        adapted.peft_config[name] = copy.deepcopy(adapted.peft_config["a0"])
        for known in (locator.rules, locator.places, locator.kinds):
            known[name] = known["a0"]
    return adapted.eval()


def measure(method: str, config: Any, loaded: int, rows: int, tokens: int, runs: int) -> dict:
    torch.manual_seed(0)
    base, adapted = random_llama(), random_llama()
    adapted.load_state_dict(base.state_dict())
    adapted = many(adapted, config, loaded)
    ids = torch.randint(10, 1000, (rows, 32))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    names = [f"a{number * loaded // rows}" for number in range(rows)]

    def run(model: Any, **more: Any) -> Callable[[], object]:
        return lambda: model.generate(**inputs, **options, **more)

    with torch.inference_mode():
        times = paired(run(adapted, adapter_names=names), run(base), runs=runs)
    return {
        "method": method,
        "loaded": loaded,
        "rows, each with another adapter": rows,
        "new tokens": tokens,
        "adapted (s)": statistics.median(times[0]),
        "base (s)": statistics.median(times[1]),
        "speed, adapted / base": 1 / ratio(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--loaded", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(2)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    methods = [
        ("ReFT, rank 4, all layers, l1", reft("l1"), given.loaded),
        ("ReFT, rank 4, all layers, f7+l7", reft("f7+l7"), given.loaded),
        ("ReFT, rank 4, all layers, all", reft("all"), given.loaded),
        ("LoRA at l16 alone, rank 4, all layers", reft("l16", "lora"), given.loaded),
        ("LoRA r8 q,v", lora, given.rows),
    ]
    rows = [measure(name, config, loaded, given.rows, given.tokens, given.runs) for name, config, loaded in methods]
    report("adapters", rows)


if __name__ == "__main__":
    main()
