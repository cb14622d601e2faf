"""Many adapters in one engine of vLLM: their speed, what they share, and when a new one answers. Needs `.ci/vllm`'s.

A random Llama, width 512, 12 layers, float32, eager. Each figure is a ratio of runs that take turns in one process, in
seconds of the processor, which other programs' load changes little.

speed    tokens a second of a batch whose requests have 1, 16 and 64 adapters out of 512, against the base model's
plain    the base model's requests in the engine with the plug-in, against vLLM without it
lora     64 adapters of ours and 64 of vLLM's multi-LoRA (rank 8 on q and v), each against its base model and each other
prefix   prompt tokens that are computed for 64 tenants with one system prompt, against those for one tenant
first    seconds to the first token of a tenant who was never seen, against the base model's

A part ends after `--seconds` with as many rounds as fit, and its rows replace those of the same name in
`results/serving.json`: so it can be measured part by part.

python benchmarks/serving.py [--parts speed plain lora prefix first] [--rounds 5] [--seconds 240] [--small]
python benchmarks/serving.py --parts lora --max-lora-rank 16      LoRA with the room that vLLM has by default
python benchmarks/serving.py --draw       the picture of what was measured, where matplotlib is installed
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "reft", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from _common import report

PARTS = ("speed", "plain", "lora", "prefix", "first")
SIZES = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "num_attention_heads": 8}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
VOCABULARY, BLOCK, RANK, SLOTS = 2048, 32, 8, 64
RULES = ("l16", "f7+l7", "all", "lora l16", "lora all")  # of LoReFT at blocks, and of LoRA on v and o
RESULTS = Path(__file__).parent / "results"
Asked = list[tuple[list[int], str | None]]  # prompts, each with an adapter's name


class Files:
    """A base model, and adapters of ours and LoRAs with random weights, each kind saved once and varied on disk."""

    def __init__(self, folder: Path, count: int, sizes: dict[str, int] = SIZES) -> None:
        self.sizes = sizes
        self.base, self.adapters, self.loras = folder / "base", folder / "adapters", folder / "loras"
        self.store, self.count = folder / "store", count
        self._seed = torch.Generator().manual_seed(0)

    def make(self, rules: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig

        import pyreft

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **self.sizes)).save_pretrained(self.base)
        for rule in rules:
            model = AutoModelForCausalLM.from_pretrained(self.base)
            formula = "lora" if rule.startswith("lora ") else "loreft"
            positions = rule.removeprefix("lora ")
            config = pyreft.ReftConfig(low_rank_dimension=RANK, positions=positions, intervention=formula)
            pyreft.get_reft_model(model, config).save_pretrained(str(self.adapters / name_of(rule, 0)))
            self._vary([self.adapters / name_of(rule, number) for number in range(self.count)])
        model = AutoModelForCausalLM.from_pretrained(self.base)
        lora = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, lora).save_pretrained(str(self.loras / "0"))
        self._vary([self.loras / str(number) for number in range(SLOTS)])

    def _vary(self, paths: list[Path]) -> None:
        config = (paths[0] / "adapter_config.json").read_text()
        tensors = load_file(paths[0] / "adapter_model.safetensors")
        for path in paths:
            path.mkdir(exist_ok=True)
            (path / "adapter_config.json").write_text(config)
            varied = {name: torch.randn(value.shape, generator=self._seed) * 0.05 for name, value in tensors.items()}
            save_file(varied, path / "adapter_model.safetensors", metadata={"format": "pt"})


def name_of(rule: str, number: int) -> str:
    return f"{rule.replace('+', '').replace(' ', '-')}-{number}"


def text(length: int, seed: int) -> list[int]:
    """Tokens that no other seed has."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Engine:
    """vLLM with the plug-in, with its own LoRA, or with neither."""

    def __init__(self, files: Files, kind: str, options: argparse.Namespace) -> None:
        from vllm import LLM

        from pyreft.serving.catalog import Catalog
        from pyreft.serving.vllm.flags import Settings, flags

        more: dict[str, Any] = {}
        if kind == "reft":
            settings = Settings(adapters=str(files.adapters), slots=SLOTS, rank=RANK, store=str(files.store))
            more = flags(settings, "LlamaForCausalLM")
        if kind == "lora":
            more = {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": SLOTS}
            more["max_lora_rank"] = options.max_lora_rank
        self.kind, self.files, self.new = kind, files, options.new
        self.catalog = Catalog(files.adapters)
        self.llm = LLM(
            str(files.base),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max(options.prompt, options.system + options.question) + options.new + BLOCK,
            max_num_seqs=options.requests,
            block_size=BLOCK,
            enforce_eager=True,
            enable_prefix_caching=True,
            **more,
        )

    def ask(self, asked: Asked, new: int | None = None) -> list:
        """Answer in one batch; every request is resolved by its name, as a server does it."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params, loras = [], []
        for _, name in asked:
            extra = {"reft": self.catalog.resolve(name).digest} if name and self.kind == "reft" else None
            params.append(SamplingParams(temperature=0, max_tokens=new or self.new, ignore_eos=True, extra_args=extra))
            lora = name if self.kind == "lora" else None
            loras.append(lora and LoRARequest(lora, int(lora) + 1, str(self.files.loras / lora)))
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
        return self.llm.generate(prompts, params, lora_request=loras if any(loras) else None, use_tqdm=False)


class Batches:
    """Batches of requests whose prompts share nothing, each asked for once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.seed = options, 0

    def seconds(self, engine: Engine, names: Sequence[str | None]) -> float:
        """Of the processor, for a batch in which request i has the adapter i modulo their number."""
        count, prompt = self.options.requests, self.options.prompt
        asked = [(text(prompt, self.seed + n), names[n % len(names)]) for n in range(count)]
        self.seed += count
        start = time.process_time()
        engine.ask(asked)
        return time.process_time() - start

    def rounds(self, runs: dict[str, Callable[[], float]], pairs: Sequence[tuple[str, str]], part: str) -> list[dict]:
        """Run all in turn, after a round that warms up; a row for each pair, the first against the second."""
        for run in runs.values():
            run()
        end, times = time.monotonic() + self.options.seconds, {name: [] for name in runs}
        for turn in range(self.options.rounds):
            began = time.monotonic()
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                times[name].append(runs[name]())
            if 2 * time.monotonic() - began > end:
                break
        tokens = self.options.requests * self.options.new
        return [
            {
                "part": part,
                "what": f"{one}, against {two}",
                "of the other's speed": statistics.median(b / a for a, b in zip(times[one], times[two], strict=True)),
                "tokens a second": tokens / statistics.median(times[one]),
                "the other's": tokens / statistics.median(times[two]),
                "rounds": len(times[one]),
            }
            for one, two in pairs
        ]


def measure_speed(engine: Engine, batches: Batches, options: argparse.Namespace) -> list[dict]:
    rows = []
    for rule in options.rules:
        runs = {"the base": lambda: batches.seconds(engine, [None])}
        for count in options.adapters:
            names = [name_of(rule, number % options.disk) for number in range(count)]
            runs[f"{rule}, {count} adapters"] = lambda names=names: batches.seconds(engine, names)
        turns = itertools.count()

        def unseen(rule: str = rule, turns: Iterator[int] = turns) -> float:
            """As many adapters as are in slots, and none of them is."""
            first = next(turns) * SLOTS
            return batches.seconds(engine, [name_of(rule, (first + n) % options.disk) for n in range(SLOTS)])

        runs[f"{rule}, {SLOTS} adapters from the disk"] = unseen
        rows += batches.rounds(runs, [(name, "the base") for name in list(runs)[1:]], "speed")
    return rows


def measure_plain(engine: Engine, plain: Engine, batches: Batches) -> list[dict]:
    engines = {"base with the plug-in": engine, "plain vLLM": plain}
    runs = {name: lambda asked=asked: batches.seconds(asked, [None]) for name, asked in engines.items()}
    return batches.rounds(runs, [tuple(runs)], "plain")


def measure_lora(engine: Engine, lora: Engine, batches: Batches, options: argparse.Namespace) -> list[dict]:
    ours = {
        f"{rule}, {SLOTS} adapters": [name_of(rule, n % options.disk) for n in range(SLOTS)] for rule in options.rules
    }
    runs = {name: lambda names=names: batches.seconds(engine, names) for name, names in ours.items()}
    room = "" if options.max_lora_rank == RANK else f" with room for rank {options.max_lora_rank}"
    loras, base = f"{SLOTS} LoRAs{room}", "the base in LoRA's engine"
    runs[loras] = lambda: batches.seconds(lora, [str(number) for number in range(SLOTS)])
    runs[base] = lambda: batches.seconds(lora, [None])
    return batches.rounds(runs, [*((name, loras) for name in ours), (loras, base)], "lora")


def measure_prefix(engine: Engine, lora: Engine, options: argparse.Namespace) -> list[dict]:
    """One request comes first, then all others at once, each with a question of its own; the model is a tiny one."""

    def computed(engine: Engine, names: Sequence[str | None]) -> int:
        engine.llm.reset_prefix_cache()
        system = text(options.system, 10**6)
        asked = [(system + text(options.question, 10**6 + 1 + n), name) for n, name in enumerate(names)]
        outputs = engine.ask(asked[:1], 1) + engine.ask(asked[1:], 1)
        return sum(len(prompt) - output.num_cached_tokens for (prompt, _), output in zip(asked, outputs, strict=True))

    rows, tenants = [], range(options.tenants)
    kinds = [(engine, rule, [name_of(rule, n % options.disk) for n in tenants]) for rule in options.rules]
    kinds.append((lora, "LoRA", [str(n % SLOTS) for n in tenants]))
    for asked, what, names in kinds:
        one, many = computed(asked, names[:1] * len(names)), computed(asked, names)
        row = {"tokens for one": one, "for all": many, "times those for one": many / one}
        rows.append({"part": "prefix", "what": f"{what}, {options.tenants} tenants", **row})
    return rows


def measure_first(engine: Engine, options: argparse.Namespace) -> list[dict]:
    """Both seconds and those of the processor, since a tenant's files are read from the disk meanwhile."""

    seeds = itertools.count(2 * 10**6)

    def seconds(name: str | None) -> tuple[float, float]:
        prompt = text(options.prompt, next(seeds))  # of which nothing is cached
        start = time.perf_counter(), time.process_time()
        engine.ask([(prompt, name)], 1)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    rows = []
    for rule in options.rules:
        unseen = [name_of(rule, options.disk - 1 - number) for number in range(1 + 6 * options.rounds)]
        asked = [(seconds(name), seconds(None)) for name in unseen][1:]
        ours, base = (np.median([pair[which] for pair in asked], axis=0) for which in (0, 1))
        row = {"milliseconds": 1000 * ours[0], "base": 1000 * base[0], "times the base's": ours[0] / base[0]}
        row["of the processor"] = ours[1] / base[1]
        rows.append({"part": "first", "what": f"{rule}, a tenant never seen", **row})
    return rows


def measure(folder: Path, part: str, options: argparse.Namespace) -> list[dict]:
    files = Files(folder, options.disk, TINY if part == "prefix" else SIZES)
    os.environ["PYREFT_STORE"] = str(files.store)
    files.make(options.rules)
    engine, batches = Engine(files, "reft", options), Batches(options)
    if part == "first":
        return measure_first(engine, options)
    if part == "speed":
        return measure_speed(engine, batches, options)
    if part == "plain":
        return measure_plain(engine, Engine(files, "plain", options), batches)
    lora = Engine(files, "lora", options)
    if part == "lora":
        return measure_lora(engine, lora, batches, options)
    return measure_prefix(engine, lora, options)


def draw(rows: list[dict], target: Path) -> None:
    """Bars of the ratios, a panel for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "serving"
    import matplotlib.pyplot as plt

    panels = {
        "of the other's speed": "speed, the other's is 1",
        "times those for one": "prompt tokens computed, one tenant's are 1",
        "times the base's": "seconds to the first token, the base's are 1",
    }
    panels = {key: title for key, title in panels.items() if any(key in row for row in rows)}
    heights = [sum(key in row for row in rows) for key in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.32 * sum(heights) + 1.1 * len(panels)), layout="constrained",
        squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for axis, (key, title) in zip(axes[:, 0], panels.items(), strict=True):
        found = [row for row in rows if key in row][::-1]
        bars = axis.barh([row["what"] for row in found], [row[key] for row in found], color="#4477aa")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rules", nargs="+", default=["l16", "all"], choices=RULES)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16, 64])
    for name, default in (("requests", 64), ("prompt", 112), ("new", 32), ("rounds", 5), ("disk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("tenants", 64), ("system", 1000), ("question", 24), ("seconds", 240)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-lora-rank", type=int, default=RANK, help="vLLM's; its own default is 16.")
    parser.add_argument("--small", action="store_true", help="See that it works, and keep nothing.")
    parser.add_argument("--draw", action="store_true", help="Draw what was measured.")
    options = parser.parse_args()
    if options.small:
        options.requests, options.prompt, options.new, options.rounds, options.disk = 4, 40, 4, 1, 8
        options.adapters, options.tenants, options.system = [1, 4], 4, 200
    return options


def main() -> None:
    options = read_options()
    kept = RESULTS / "serving.json"
    known = json.loads(kept.read_text())["rows"] if kept.exists() else []
    if options.draw:
        draw(known, RESULTS / "serving.svg")
        return
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), part, options)
        new = {(row["part"], row["what"]) for row in rows}
        known = [row for row in known if (row["part"], row["what"]) not in new] + rows
        report("serving", rows if options.small else known, keep=not options.small)


if __name__ == "__main__":
    main()
