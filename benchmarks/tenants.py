"""A plan on paper for many tenants: what their adapters weigh, how often one is in a slot, when a replica is full.

Bytes and times are those of adapters that are really saved and loaded, of the widths and depths of known models. Hit
rates come of a simulation: tenants ask by Zipf's law (the k-th of them 1 / k^s as often as the first), each replica
has the slots of the server (`pyreft.serving.bank.Slots`), and a request goes to any replica, or to one that holds its
adapter, and else to the one that holds fewest, as Ray Serve's router does. The first half warms up. A replica is an
M/M/c queue: requests come at random, one of `rows` answers takes an exponential time; it is full when one request in a
hundred waits longer than a tenth of an answer's time.

python benchmarks/tenants.py [--tenants 10000] [--requests 200000] [--rank 8] [--seconds 10] [--seed 0]
"""

import argparse
import math
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pyreft
from _common import report
from pyreft.serving.bank import Bank, Slots
from pyreft.serving.served import read_adapter

MODELS = {  # width and blocks
    "Qwen3-0.6B": (1024, 28),
    "Llama-3.2-1B": (2048, 16),
    "Llama-3.1-8B": (4096, 32),
    "Qwen3-32B": (5120, 64),
    "Llama-3.1-70B": (8192, 80),
}
EXPONENTS = (0.8, 1.0, 1.2)
SLOTS = (64, 256, 1024)
ROUTES = ((1, "any"), (2, "any"), (2, "holder"), (8, "any"), (8, "holder"))
RUNNING = 16  # answers that grow at once, and keep their slots


class Replica:
    """The slots of one server, and the requests that keep theirs."""

    def __init__(self, slots: int, running: int = RUNNING) -> None:
        self.slots = Slots(slots)
        self.running = running
        self.asked = self.loads = 0
        self._inside: deque[int] = deque()

    def ask(self, adapter: int) -> bool:
        """Answer one more request; whether its adapter was in a slot."""
        before = self.loads
        while len(self._inside) >= self.running or not self.slots.has_room(adapter):
            self.slots.release(self._inside.popleft())
        self.slots.take(adapter, self._load)
        self._inside.append(adapter)
        self.asked += 1
        return self.loads == before

    def _load(self, slot: int) -> None:
        self.loads += 1


def choose(replicas: Sequence[Replica], adapter: int, route: str, draw: random.Random) -> Replica:
    """The replica for a request: "any", or a "holder" of its adapter and else one that holds fewest."""
    if route == "any":
        return draw.choice(replicas)
    holders = [replica for replica in replicas if adapter in replica.slots.of]
    if not holders:
        fewest = min(len(replica.slots.of) for replica in replicas)
        holders = [replica for replica in replicas if len(replica.slots.of) == fewest]
    return draw.choice(holders)


def simulate(requests: Iterable[int], replicas: Sequence[Replica], route: str, seed: int) -> list[bool]:
    """Whether each request's adapter was in a slot."""
    draw = random.Random(seed)
    return [choose(replicas, adapter, route, draw).ask(adapter) for adapter in requests]


def zipf(tenants: int, exponent: float, requests: int, seed: int) -> list[int]:
    """Tenants by number, as they ask."""
    shares = torch.arange(1, tenants + 1, dtype=torch.float64) ** -exponent
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(shares, requests, replacement=True, generator=generator).tolist()


def waits(rows: int, load: float) -> float:
    """Erlang's C: the share of requests that wait, where so many rows have a load of so many answers at once."""
    if load >= rows:
        return 1.0
    blocked = 1.0
    for row in range(1, rows + 1):
        blocked = load * blocked / (row + load * blocked)
    return blocked / (1 - load / rows * (1 - blocked))


def most_load(rows: int, share: float = 0.01, within: float = 0.1) -> float:
    """The greatest load at which at most this share waits longer than `within` of an answer's time."""

    def late(load: float) -> float:
        return waits(rows, load) * math.exp(-(rows - load) * within)

    low, high = 0.0, float(rows)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if late(middle) <= share else (low, middle)
    return low


def weigh(name: str, rank: int, tenants: int, folder: Path) -> dict:
    """Save an adapter of a model's width and depth, and put it into a slot."""
    width, blocks = MODELS[name]
    thin = LlamaConfig(  # all of the model but its residual stream is as small as can be
        hidden_size=width, num_hidden_layers=blocks, intermediate_size=8, vocab_size=8, head_dim=2,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = pyreft.get_reft_model(
        AutoModelForCausalLM.from_config(thin),
        pyreft.ReftConfig(low_rank_dimension=rank, positions="l16", intervention="loreft"),
    )
    model.save_pretrained(str(folder / name))
    files = sum(path.stat().st_size for path in (folder / name).iterdir() if path.name.startswith("adapter_"))
    bank = Bank(slots=2, rank=rank, width=width)
    took = []
    for slot in (0, 1, 0, 1):
        start = time.process_time()
        bank.write(slot, read_adapter(folder / name).edits())
        took.append(time.process_time() - start)
    return {
        "what": "adapter",
        "model": name,
        "rank": rank,
        "MB on disk": files / 1e6,
        "MB in a slot": bank.bytes() / bank.slots / 1e6,
        "GB of all tenants": files * tenants / 1e9,
        "ms to load": 1e3 * min(took[1:]),
    }


def hits(exponent: float, slots: int, options: argparse.Namespace) -> dict:
    """How often an adapter was in a slot, for each number of replicas and way to route."""
    asked = zipf(options.tenants, exponent, options.requests, options.seed)
    row = {"what": "hits", "exponent": exponent, "slots": slots}
    for count, route in ROUTES:
        replicas = [Replica(slots) for _ in range(count)]
        found = simulate(asked, replicas, route, options.seed)[options.requests // 2 :]
        row[f"{count} by {route}"] = sum(found) / len(found)
        if route == "holder":
            row[f"busiest of {count}"] = max(replica.asked for replica in replicas) * count / options.requests
    return row


def full(rows: int, options: argparse.Namespace) -> dict:
    """When a replica of so many rows is full."""
    load = most_load(rows)
    a_second = load / options.seconds
    return {
        "what": "full",
        "rows": rows,
        "answers at once": load,
        "requests a second": a_second,
        "requests of a tenant a day": a_second * 86400 / options.tenants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tenants", 10_000), ("requests", 200_000), ("rank", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=10.0, help="that an answer takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [weigh(name, options.rank, options.tenants, Path(folder)) for name in MODELS]
    rows += [hits(exponent, slots, options) for exponent in EXPONENTS for slots in SLOTS]
    rows += [full(count, options) for count in (16, 64, 256)]
    settings = {name: getattr(options, name) for name in ("tenants", "requests", "seconds", "seed")}
    report("tenants", [row | settings for row in rows])


if __name__ == "__main__":
    main()
