"""Training steps to compare: edits, LoRA, the floor of each, and the original library in a process of its own."""

import copy
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import pyreft
from _memory import peak_bytes
from pyreft.reach import Reach

Sizes = dict[str, int]
MAIN: Sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "vocab_size": 8000}
BATCH, RANK = 8, 8


@functools.cache
def _shared(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(num_attention_heads=heads, max_position_embeddings=8192, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).requires_grad_(False)


def llama(sizes: Sizes) -> LlamaForCausalLM:
    """A random model whose weights all models of these sizes share; they are frozen."""
    base = _shared(**sizes)
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def batch_of(vocabulary: int, prompt: int, answer: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(prompt)
    ids = torch.randint(5, vocabulary, (BATCH, prompt + answer), generator=draw)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Subject:
    """A model in training, and its step."""

    def __init__(self, model: Any, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> None:
        self.call, self.batch = call or model, batch
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(self) -> None:
        self.call(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self) -> int:
        return peak_bytes(self.step)


class LoRA(Subject):
    """LoRA of rank 8 on queries and values."""

    def __init__(self, sizes: Sizes, batch: dict[str, Tensor]) -> None:
        config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        super().__init__(get_peft_model(llama(sizes), config).train(), batch)


class Edited(Subject):
    """Edits of rank 8, whose first step runs the prefixes and whose later ones do not."""

    def __init__(
        self, sizes: Sizes, batch: dict[str, Tensor], layers: Any, positions: str, formula: str = "loreft"
    ) -> None:
        config = pyreft.ReftConfig(layers=layers, positions=positions, intervention=formula, low_rank_dimension=RANK)
        model = pyreft.get_reft_model(llama(sizes), config).train()
        self.reach = Reach(model)
        super().__init__(model, batch, self.reach)

    def first(self) -> None:
        """A step of the first epoch."""
        self.reach.store.clear()
        self.step()


def floor(sizes: Sizes, batch: dict[str, Tensor], skipped: int, start: int) -> Callable[[], None]:
    """The tokens from `start` to the last that predicts one, through the blocks from `skipped` on and the head where
    there are labels, forward and activation gradient: bare blocks behind ready keys and values, no edit code."""
    base = llama(sizes).train()
    ids, labels = batch["input_ids"], batch["labels"]
    stop = ids.shape[1] - 1
    with torch.no_grad():
        filled = base.model(input_ids=ids[:, :start], use_cache=True).past_key_values if start else None
        embedded = base.model.embed_tokens(ids[:, start:stop])
    at = (labels[:, start + 1 :] != -100).nonzero(as_tuple=True)
    targets = labels[:, start + 1 :][at]
    states = embedded.clone().requires_grad_()
    positions = torch.arange(start, stop)[None]
    mask = None
    if start:
        seen = torch.arange(stop)[None] <= torch.arange(start, stop)[:, None]
        mask = seen[None, None].expand(BATCH, 1, -1, -1)

    def run() -> None:
        cache = None
        if filled is not None:
            cache = DynamicCache(config=base.config)
            for target, source in zip(cache.layers, filled.layers, strict=True):
                target.lazy_initialization(source.keys, source.values)
                target.keys, target.values = source.keys, source.values
        rotary = base.model.rotary_emb(states, position_ids=positions)
        h = states
        for block in base.model.layers[skipped:]:
            h = block(h, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=bool(start))
        logits = base.lm_head(base.model.norm(h)[at])
        nn.functional.cross_entropy(logits.float(), targets).backward()
        states.grad = None

    return run


class Original:
    """The original library, which trains the same edits in a process with its own interpreter and packages."""

    def __init__(self, python: str, sizes: Sizes, prompt: int, answer: int, layers: list[int], positions: str) -> None:
        script = Path(__file__).parent / "_original.py"
        self._process = subprocess.Popen(
            [python, "-W", "ignore", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._ask(
            {"sizes": sizes, "prompt": prompt, "answer": answer, "batch": BATCH, "rank": RANK}
            | {"layers": layers, "positions": positions}
        )

    def step(self) -> None:
        self._ask("step")

    def peak(self) -> int:
        return self._ask("peak")

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, what: Any) -> Any:
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        print(json.dumps(what), file=pipes.stdin, flush=True)
        for line in pipes.stdout:
            if line.startswith("{"):  # the libraries print, too
                return json.loads(line)["answer"]
        raise RuntimeError("The original's process ended; its errors stand above.")


def in_turn(steps: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Time functions in turn, round after round; each is run twice and timed the second time, as in a training, where
    the memory that a step needs is there from the step before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def ratio_of(times: dict[str, list[float]], above: str, below: str) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
