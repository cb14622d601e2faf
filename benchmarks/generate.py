"""What prompt-only edits cost in generation: an adapted model against its base, in pairs.

python benchmarks/generate.py
"""

import argparse
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyreft
from _common import paired, ratio, report
from pyreft import pocket


def random_llama() -> LlamaForCausalLM:
    """About 100 M parameters."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16000, eos_token_id=None, **sizes)).eval()


def measure(name: str, make: object, positions: str, tokens: int, runs: int) -> dict:
    torch.manual_seed(0)
    base, edited = make(), make()
    edited.load_state_dict(base.state_dict())
    config = pyreft.ReftConfig(layers="all", positions=positions, low_rank_dimension=4)
    edited = pyreft.get_reft_model(edited, config).eval()
    ids = torch.randint(10, 1000, (1, 32))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run(model: torch.nn.Module) -> object:
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    times = paired(run(edited), run(base), runs=runs)
    return {
        "model": name,
        "parameters (M)": base.num_parameters() / 1e6,
        "positions": positions,
        "new tokens": tokens,
        "edited (s)": statistics.median(times[0]),
        "base (s)": statistics.median(times[1]),
        "edited / base": ratio(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    torch.set_num_threads(2)
    rows = [
        measure(name, make, positions, tokens, runs)
        for name, make, tokens in (("embedded", lambda: pocket.load()[0], 128), ("random Llama", random_llama, 64))
        for positions in ("l1", "f7+l7")
    ]
    report("generate", rows)


if __name__ == "__main__":
    main()
