"""Many adapters in one engine of vLLM: their speed, what they share, and when a new one answers. Needs `.ci/vllm`'s.

A random Llama, width 512, 12 layers, float32, eager. Each figure is a ratio of two runs that take turns in one process,
in seconds of the processor where that says the same as seconds, which other programs' load does not change.

speed    tokens a second of a batch whose requests have 1, 16 and 64 adapters out of 512, against the base model's
plain    the base model's requests in the engine with the plug-in, against vLLM without it
lora     64 adapters of vLLM's multi-LoRA (rank 8 on q and v), against its own base model and against ours
prefix   prompt tokens that are computed for 64 tenants with one system prompt, against those for one tenant
first    seconds to the first token of a tenant who was never seen, against the base model's

python benchmarks/serving.py [--parts speed plain lora prefix first] [--runs 5] [--small]
python benchmarks/serving.py --draw       the picture of what was measured, where matplotlib is installed
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "reft", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from safetensors.torch import load_file, save_file

from _common import report

PARTS = ("speed", "plain", "lora", "prefix", "first")
SIZES = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "num_attention_heads": 8}
VOCABULARY, BLOCK, RANK, SLOTS = 2048, 32, 8, 64
RULES = ("l16", "f7+l7", "all")
RESULTS = Path(__file__).parent / "results"
Asked = list[tuple[list[int], str | None]]  # prompts, each with an adapter's name


class Files:
    """A base model, and adapters of ours and LoRAs with random weights, each kind saved once and varied on disk."""

    def __init__(self, folder: Path, count: int) -> None:
        self.base, self.adapters, self.loras = folder / "base", folder / "adapters", folder / "loras"
        self.store, self.count = folder / "store", count
        self._seed = torch.Generator().manual_seed(0)

    def make(self, rules: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig

        import pyreft

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(self.base)
        for rule in rules:
            model = AutoModelForCausalLM.from_pretrained(self.base)
            config = pyreft.ReftConfig(low_rank_dimension=RANK, positions=rule)
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
    return f"{rule.replace('+', '')}-{number}"


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
            more = {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": SLOTS, "max_lora_rank": RANK}
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


class Timing:
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

    def compare(self, one: Callable[[], float], two: Callable[[], float]) -> dict[str, float]:
        """Tokens a second of both, and the median of the ratios, after a pair that warms up."""
        pairs = [(one(), two()) for _ in range(self.options.runs + 1)][1:]
        tokens = self.options.requests * self.options.new
        return {
            "of the other's speed": statistics.median(b / a for a, b in pairs),
            "tokens a second": tokens / statistics.median(a for a, _ in pairs),
            "the other's": tokens / statistics.median(b for _, b in pairs),
        }


def measure_speed(engine: Engine, timing: Timing, options: argparse.Namespace) -> list[dict]:
    rows = []
    for rule in options.rules:
        for count in options.adapters:
            for fresh in (False, True):
                turn = 0

                def names(rule: str = rule, count: int = count, fresh: bool = fresh) -> list[str | None]:
                    nonlocal turn
                    turn += fresh
                    return [name_of(rule, (turn * count + n) % options.disk) for n in range(count)]

                found = timing.compare(
                    lambda names=names: timing.seconds(engine, names()), lambda: timing.seconds(engine, [None])
                )
                what = f"{rule}, {count} adapters" + (", each from the disk" if fresh else "")
                rows.append({"part": "speed", "what": what, **found})
    return rows


def measure_plain(engine: Engine, plain: Engine, timing: Timing) -> list[dict]:
    found = timing.compare(lambda: timing.seconds(engine, [None]), lambda: timing.seconds(plain, [None]))
    return [{"part": "plain", "what": "base with the plug-in, against plain vLLM", **found}]


def measure_lora(engine: Engine, lora: Engine, timing: Timing, options: argparse.Namespace) -> list[dict]:
    loras = [str(number) for number in range(SLOTS)]
    rows = []
    for rule in options.rules:
        ours = [name_of(rule, number % options.disk) for number in range(SLOTS)]
        found = timing.compare(lambda ours=ours: timing.seconds(engine, ours), lambda: timing.seconds(lora, loras))
        rows.append({"part": "lora", "what": f"{rule}, {SLOTS} adapters, against {SLOTS} LoRAs", **found})
    found = timing.compare(lambda: timing.seconds(lora, loras), lambda: timing.seconds(lora, [None]))
    return [*rows, {"part": "lora", "what": f"{SLOTS} LoRAs, against the base model beside them", **found}]


def measure_prefix(engine: Engine, lora: Engine | None, options: argparse.Namespace) -> list[dict]:
    """One request comes first, then all others at once, each with a question of its own."""

    def computed(engine: Engine, names: Sequence[str | None]) -> int:
        engine.llm.reset_prefix_cache()
        system = text(options.system, 10**6)
        asked = [(system + text(options.question, 10**6 + 1 + n), name) for n, name in enumerate(names)]
        outputs = engine.ask(asked[:1], 1) + engine.ask(asked[1:], 1)
        return sum(len(prompt) - output.num_cached_tokens for (prompt, _), output in zip(asked, outputs, strict=True))

    rows, tenants = [], range(options.tenants)
    kinds = [(engine, rule, [name_of(rule, n % options.disk) for n in tenants]) for rule in options.rules]
    if lora is not None:
        kinds.append((lora, "LoRA", [str(n % SLOTS) for n in tenants]))
    for asked, what, names in kinds:
        one, many = computed(asked, names[:1] * len(names)), computed(asked, names)
        row = {"tokens for one": one, "for all": many, "times those for one": many / one}
        rows.append({"part": "prefix", "what": f"{what}, {options.tenants} tenants", **row})
    return rows


def measure_first(engine: Engine, options: argparse.Namespace) -> list[dict]:
    """Seconds, since a tenant's files are read from the disk meanwhile."""

    def seconds(name: str | None, seed: int) -> float:
        start = time.perf_counter()
        engine.ask([(text(options.prompt, seed), name)], 1)
        return time.perf_counter() - start

    rows = []
    for rule in options.rules:
        unseen = [name_of(rule, options.disk - 1 - number) for number in range(4 * options.runs)]
        pairs = [(seconds(name, 2 * 10**6 + n), seconds(None, 3 * 10**6 + n)) for n, name in enumerate(unseen)]
        rows.append(
            {
                "part": "first",
                "what": f"{rule}, a tenant never seen",
                "milliseconds": 1000 * statistics.median(a for a, _ in pairs),
                "base": 1000 * statistics.median(b for _, b in pairs),
                "times the base's": statistics.median(a / b for a, b in pairs),
            }
        )
    return rows


def measure(folder: Path, options: argparse.Namespace) -> list[dict]:
    files = Files(folder, options.disk)
    os.environ["PYREFT_STORE"] = str(files.store)
    files.make(options.rules)
    timing = Timing(options)
    engine = Engine(files, "reft", options)
    rows = measure_first(engine, options) if "first" in options.parts else []  # while none is loaded
    if "speed" in options.parts:
        rows += measure_speed(engine, timing, options)
    if "plain" in options.parts:
        rows += measure_plain(engine, Engine(files, "plain", options), timing)
    lora = Engine(files, "lora", options) if {"lora", "prefix"} & set(options.parts) else None
    if lora is not None and "lora" in options.parts:
        rows += measure_lora(engine, lora, timing, options)
    if "prefix" in options.parts:
        rows += measure_prefix(engine, lora, options)
    return rows


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
    for name, default in (("requests", 64), ("prompt", 112), ("new", 32), ("runs", 5), ("disk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("tenants", 64), ("system", 1000), ("question", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--small", action="store_true", help="See that it works, and keep nothing.")
    parser.add_argument("--draw", action="store_true", help="Draw what was measured.")
    options = parser.parse_args()
    if options.small:
        options.requests, options.prompt, options.new, options.runs, options.disk = 4, 40, 4, 1, 8
        options.adapters, options.tenants, options.system = [1, 4], 4, 200
    return options


def main() -> None:
    options = read_options()
    if options.draw:
        rows = json.loads((RESULTS / "serving.json").read_text())["rows"]
        draw(rows, RESULTS / "serving.svg")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    report("serving", rows, keep=not options.small)


if __name__ == "__main__":
    main()
