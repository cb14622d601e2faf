"""Tokens a second: one batch with many adapters against the base model, in one process.

A random Llama, requests of equal length, no prefix shared. Every figure is the median ratio of pairs of runs, each of
the adapters' and the base's in turn, in seconds of the processor. Through vLLM (see `.ci/vllm`), or through the engine
on transformers, which is compared with a batch of `generate`, too; versions are recorded.

python benchmarks/serving.py [--requests 64] [--prompt 112] [--new 32] [--runs 5] [--adapters 1 16 64] [--rules l16 all]
python benchmarks/serving.py --engine transformers [--requests 16] [--adapters 1 16]
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
from pyreft import pocket
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
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    for name, default in (("requests", None), ("prompt", 112), ("new", 32), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--adapters", type=int, nargs="+")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    options = parser.parse_args()
    here = options.engine == "transformers"
    options.requests = options.requests or (16 if here else 64)
    options.adapters = options.adapters or ([1, 16] if here else [1, 16, 64])
    with tempfile.TemporaryDirectory() as folder:
        (measure_here if here else measure)(Path(folder), options)


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


def measure_here(folder: Path, options: argparse.Namespace) -> None:
    """The engine on transformers; its answers are those of `generate`, which is asked for the base's."""
    from pyreft.serving.catalog import Store
    from pyreft.serving.laptop.engine import Engine
    from pyreft.serving.laptop.requests import Request

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
    report("serving-here", rows)


if __name__ == "__main__":
    main()
