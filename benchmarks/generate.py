"""What prompt-only edits cost in generation: an adapted model against its base, in pairs, and LoRA beside it.

python benchmarks/generate.py
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pyreft
from _common import paired, ratio, report
from pyreft import pocket


def random_llama() -> LlamaForCausalLM:
    """About 100 M parameters."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16000, eos_token_id=None, **sizes)).eval()


def reft(positions: str, formula: str = "loreft") -> pyreft.ReftConfig:
    return pyreft.ReftConfig(layers="all", positions=positions, intervention=formula, low_rank_dimension=4)


METHODS = {
    "ReFT, l1": reft("l1"),
    "ReFT, f7+l7": reft("f7+l7"),
    "LoRA at l16 alone": reft("l16", "lora"),
    "LoRA r8 q,v, not merged": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
}


def measure(name: str, make: Callable[[], Any], method: str, tokens: int, runs: int) -> dict:
    torch.manual_seed(0)
    base, edited = make(), make()
    edited.load_state_dict(base.state_dict())
    edited = get_peft_model(edited, copy.deepcopy(METHODS[method])).eval()
    ids = torch.randint(10, 1000, (1, 32))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run(model: Any) -> Callable[[], object]:
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    times = paired(run(edited), run(base), runs=runs)
    return {
        "model": name,
        "parameters (M)": base.num_parameters() / 1e6,
        "method": method,
        "new tokens": tokens,
        "adapted (s)": statistics.median(times[0]),
        "base (s)": statistics.median(times[1]),
        "adapted / base": ratio(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    torch.set_num_threads(2)
    rows = [
        measure(name, make, method, tokens, runs)
        for name, make, tokens in (("embedded", lambda: pocket.load()[0], 128), ("random Llama", random_llama, 64))
        for method in METHODS
    ]
    report("generate", rows)


if __name__ == "__main__":
    main()
