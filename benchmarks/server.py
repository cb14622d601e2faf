"""Tokens a second of `pyreft serve` on transformers: many adapters in one running batch against the base model.

A random Llama, requests of equal length. Each figure is the median ratio of pairs of runs in one process, the adapters'
and the base's in turn, in seconds of the processor, and against a batch of `generate`, whose answers are compared.

python benchmarks/server.py [--requests 16] [--prompt 112] [--new 32] [--runs 5] [--adapters 1 16] [--rules l16 all]
"""

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pyreft
from _common import ratio, report
from pyreft import pocket
from pyreft.serving.catalog import Catalog, Store
from pyreft.serving.laptop.engine import Engine
from pyreft.serving.laptop.requests import Request

SIZES = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "num_attention_heads": 8}
VOCABULARY = 2048
RULES = ("l16", "f7+l7", "all")


def make_base(path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(path)


def make_adapters(base: Path, root: Path, count: int) -> None:
    """Adapters with random weights, so many for each rule."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for rule in RULES:
        config = pyreft.ReftConfig(low_rank_dimension=8, intervention="loreft", positions=rule)
        adapted = pyreft.get_reft_model(model, config)
        for number in range(count):
            for name, parameter in adapted.named_parameters():
                if "reft_" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            adapted.save_pretrained(str(root / f"{rule.replace('+', '')}-{number}"))
        adapted.unload()


def measure(folder: Path, options: argparse.Namespace) -> None:
    """The engine on transformers; its answers are those of `generate`, which is asked for the base's."""
    base, root = folder / "base", folder / "adapters"
    make_base(base)
    make_adapters(base, root, max(options.adapters))
    catalog = Catalog(root, Store(folder / "store"))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.generation_config.eos_token_id = None
    tokenizer = pocket.load()[1]
    engine = Engine(model, tokenizer, rows=options.requests, rank=8)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (options.requests, options.prompt), generator=generator)
    answers: dict[int, list[int]] = {}

    def run(names: list[str | None]) -> float:
        answers.clear()
        start = time.process_time()
        for number, prompt in enumerate(prompts.tolist()):
            name = names[number % len(names)]
            adapter = None if name is None else catalog.resolve(name)
            own = answers[number] = []
            request = Request(prompt, lambda piece, own=own: own.append(piece.choice.token), adapter, most=options.new)
            engine.submit(request)
        while any(engine.scheduler.counts.values()):
            engine.scheduler.turn()
        return time.process_time() - start

    def generate() -> tuple[float, list[list[int]]]:
        start = time.process_time()
        with torch.no_grad():
            tokens = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=options.new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.process_time() - start, tokens[:, options.prompt :].tolist()

    rows = []
    for rule in options.rules:
        for count in options.adapters:
            names: list[str | None] = [f"{rule.replace('+', '')}-{number}" for number in range(count)]
            times: tuple[list[float], ...] = ([], [], [])
            for turn in range(options.runs + 1):
                found = run(names), run([None])
                plain, expected = generate()
                equal = sum(answers[number] == row for number, row in enumerate(expected))
                if turn:  # the first loads and warms up
                    for kept, value in zip(times, (*found, plain), strict=True):
                        kept.append(value)
            rows.append(
                {
                    "rule": rule,
                    "adapters": count,
                    "of the base's speed": 1 / ratio(times[:2]),
                    "of generate's speed": 1 / ratio((times[0], times[2])),
                    "base's answers equal to generate's": f"{equal} of {options.requests}",
                    "transformers": version("transformers"),
                }
            )
    report("server", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 16), ("prompt", 112), ("new", 32), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
