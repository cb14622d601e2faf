"""What prompt-only edits cost in generation: an adapted model against its base, in pairs, and LoRA beside it.

python benchmarks/generate.py
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import pyreft
from _common import paired, ratio, report
from pyreft import pocket


def random_llama() -> LlamaForCausalLM:
    """About 100 M parameters."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16000, eos_token_id=None, **sizes)).eval()


def reft(positions: str, formula: str = "loreft") -> pyreft.ReftConfig:
    return pyreft.ReftConfig(layers="all", positions=positions, intervention=formula, low_rank_dimension=4)


MODELS: dict[str, tuple[Callable[[], Any], int]] = {  # and the tokens of an answer
    "embedded": (lambda: pocket.load()[0], 128),
    "random Llama": (random_llama, 64),
}
METHODS: dict[str, Any] = {
    "hooks that do nothing": None,
    "ReFT, l1": reft("l1"),
    "ReFT, f7+l7": reft("f7+l7"),
    "LoRA at l16 alone": reft("l16", "lora"),
    "LoRA r8 q,v, not merged": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
}


def hooked(model: Any) -> Any:
    """A hook behind each block that does nothing: what PyTorch itself asks for being asked."""
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: None)
    return model


class Clock(StoppingCriteria):
    """Never stops, and notes when each token was there: behind the first one are the decoding steps alone."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(name: str, make: Callable[[], Any], tokens: int, method: str, runs: int, pairs: int) -> dict:
    """Several pairs of models, since where a model lies in memory makes it faster or slower by some percent."""
    torch.manual_seed(0)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    times: tuple[list[float], list[float]] = ([], [])
    steps: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    step_ratios: list[float] = []
    for number in range(pairs):
        base, edited = make(), make()
        if number % 2:
            base, edited = edited, base
        edited.load_state_dict(base.state_dict(), assign=True)
        config = METHODS[method]
        edited = hooked(edited) if config is None else get_peft_model(edited, copy.deepcopy(config)).eval()
        ids = torch.randint(10, 1000, (1, 32))

        def run(model: Any, steps: list[float], ids: torch.Tensor = ids) -> Callable[[], object]:
            def answer() -> None:
                clock = Clock()
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **options)
                steps.append((clock.stamps[-1] - clock.stamps[0]) / (tokens - 1))

            return answer

        own: tuple[list[float], list[float]] = ([], [])
        both = paired(run(edited, own[0]), run(base, own[1]), runs=runs)
        del own[0][0], own[1][0]  # of the unmeasured runs
        ratios.append(ratio(both))
        step_ratios.append(ratio(own))
        for which in (0, 1):
            times[which].extend(both[which])
            steps[which].extend(own[which])
    return {
        "model": name,
        "parameters (M)": base.num_parameters() / 1e6,
        "method": method,
        "new tokens": tokens,
        "adapted (s)": statistics.median(times[0]),
        "base (s)": statistics.median(times[1]),
        "adapted / base": statistics.median(ratios),
        "a base's step (ms)": 1e3 * statistics.median(steps[1]),
        "steps, adapted / base": statistics.median(step_ratios),
        "of pairs": sorted(round(one, 3) for one in step_ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5, help="of each pair of models")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    rows = [
        measure(name, *MODELS[name], method, asked.runs, asked.pairs)
        for name in asked.models
        for method in asked.methods
    ]
    report("generate", rows, keep=(asked.models, asked.methods) == (list(MODELS), list(METHODS)))


if __name__ == "__main__":
    main()
