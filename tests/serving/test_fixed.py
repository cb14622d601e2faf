"""Edits with fixed shapes: the same numbers as by tiles, whatever the step, and replayed without Python."""

import os
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyreft.errors import ReftError
from pyreft.positions import Positions
from pyreft.serving.affine import LowRank, Vectors
from pyreft.serving.bank import Bank
from pyreft.serving.fixed import FixedBank, edit_plainly
from pyreft.serving.tokens import Place, Row, plan

SIZES = {"slots": 3, "rank": 4, "width": 16}
PLACES = [Place(-1, 0), Place(0, 0), Place(1, 0)]
TOKENS = 20


def row(slot, *rules, prompt=8, strength=1.0):
    return Row(
        slot, dict(zip(PLACES, range(len(rules)), strict=False)), list(map(Positions.parse, rules)), prompt, strength
    )


# rows by number, where the tokens of each begin, and how many are computed
STEPS = [
    ({0: row(0, "l2", "f1"), 2: row(1, "all", "all", "all", prompt=5, strength=0.5)}, [0, 8, 9, 14], [0, 30, 0]),
    # a last chunk of one token beside rows that decode: it is edited, as is the row of `all`
    ({0: row(2, "l1", prompt=9), 1: row(0, "l2", "f1"), 2: row(1, "all", prompt=5)}, [0, 1, 2, 3, 4], [8, 8, 5, 3]),
    ({0: row(0, "l2", "f1")}, [0, 1], [8]),  # nothing
]


def edits(seed, rank):
    made = torch.Generator().manual_seed(seed)
    shape = rank, SIZES["width"]
    return {place: LowRank(*(torch.randn(*s, generator=made) for s in (shape, shape[:1], shape))) for place in PLACES}


@pytest.fixture
def banks():
    free, fixed = Bank(**SIZES), FixedBank(PLACES, tokens=TOKENS, **SIZES)
    for slot, rank in enumerate((4, 2, 3)):
        for bank in (free, fixed):
            bank.write(slot, edits(slot, rank))
    return free, fixed


def states(tokens, dtype=torch.float32):
    return [torch.randn(tokens, SIZES["width"]).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_edits_are_those_by_tiles_in_one_step_after_another(banks, pair, dtype, tolerance):
    free, fixed = banks
    for rows, starts, computed in (*STEPS, STEPS[0]):
        step = plan(rows, starts, computed)
        padded = starts[-1] + 3  # as a graph of the next size has them
        for bank in banks:
            bank.begin(step, starts[-1])
        for place in PLACES:
            hidden, residual = states(padded, dtype)
            one, two = ([hidden.clone(), residual.clone() if pair else None] for _ in range(2))
            free.edit(place, *one)
            fixed.edit(place, *two)
            for a, b in zip(one, two, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
            located = [] if step is None or step.at(place) is None else sorted(step.at(place).at.tolist())
            changed = (two[0] != hidden).any(1).nonzero().flatten().tolist()
            assert changed == located


def test_a_last_chunk_of_one_token_is_edited_among_rows_that_decode(banks):
    rows, starts, computed = STEPS[1]
    step = plan(rows, starts, computed)
    assert sorted(step.at(PLACES[0]).at.tolist()) == [0, 2]


def test_a_recorded_graph_replays_each_step_from_the_buffers_alone(banks):
    free, fixed = banks
    place = PLACES[0]
    fixed.begin(None, 0)

    def run(hidden, residual):
        fixed.edit(place, hidden, residual)
        return hidden, residual

    graph = make_fx(run)(*states(8))  # recorded in a step that edits nothing, as engines do
    for rows, starts, computed in (STEPS[1], (STEPS[0][0], [0, 2, 3, 8], [6, 30, 0]), STEPS[2], STEPS[1]):
        step = plan(rows, starts, computed)
        for bank in banks:
            bank.begin(step, starts[-1])
        hidden, residual = states(8)
        expected = hidden.clone(), residual.clone()
        free.edit(place, *expected)
        torch.testing.assert_close(graph(hidden, residual), expected)


def test_no_memory_moves(banks):
    _, fixed = banks
    tensors = [value for value in vars(fixed).values() if isinstance(value, torch.Tensor)]
    before = [tensor.data_ptr() for tensor in tensors]
    assert len(before) == 5
    for rows, starts, computed in STEPS:
        fixed.begin(plan(rows, starts, computed), starts[-1])
    fixed.write(1, edits(9, 1))
    assert [value.data_ptr() for value in vars(fixed).values() if isinstance(value, torch.Tensor)] == before
    assert not fixed.a[:, 1, 1:].any()  # of the rank 2 that was there


@pytest.mark.parametrize(
    "edit",
    [
        {Place(0, 0): Vectors(shift=torch.zeros(16))},
        {Place(0, 1): LowRank(torch.zeros(1, 16), torch.zeros(1), torch.zeros(1, 16))},  # a second one
        {Place(0, 0): LowRank(torch.zeros(1, 16), torch.zeros(1), torch.zeros(1, 16), "relu", 1)},
    ],
)
def test_what_no_graph_can_replay_is_refused_and_the_slot_stays(banks, edit):
    _, fixed = banks
    before = fixed.a.clone()
    with pytest.raises(ReftError, match="behind block 0 cannot be replayed in a CUDA graph"):
        fixed.write(0, edit)
    assert torch.equal(fixed.a, before)


KERNEL = """
import torch
from pyreft.serving.fixed import edit_plainly
from pyreft.serving.kernel import edit
torch.manual_seed(0)
for width, rank, dtype in ((48, 4, torch.float32), (1030, 3, torch.bfloat16)):
    weights = torch.randn(3, rank, width) / width**0.5, torch.randn(3, rank), torch.randn(3, rank, width) / rank**0.5
    slots = torch.tensor([[2, 0], [-1, 0], [0, 0], [1, 0], [-1, 0]], dtype=torch.int32)[:, 0]
    strength = torch.tensor([1.0, 1.0, 0.5, -2.0, 1.0, 7.0])
    for pair in (False, True):
        states = [torch.randn(5, width).to(dtype) for _ in range(1 + pair)]
        one, two = ([state.clone() for state in states] + [None] * (not pair) for _ in range(2))
        edit(*one, slots, strength, *weights)
        edit_plainly(*two, slots, strength, *weights)
        for a, b in zip(one[: 1 + pair], two):
            tolerance = 1e-4 if dtype == torch.float32 else 0.05  # the interpreter cuts off where others round
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        assert torch.equal(one[0][[1, 4]], states[0][[1, 4]])
        assert not torch.equal(one[-1 if pair else 0][0], states[-1 if pair else 0][0])
print("equal")
"""


def test_the_kernel_computes_the_same_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with vLLM and with torch for GPUs")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_what_the_kernel_leaves_alone_is_not_a_number_twice_rounded():
    hidden, residual = states(2, torch.bfloat16)
    before = hidden.clone(), residual.clone()
    zeros = torch.zeros(1, 2, 16)
    edit_plainly(hidden, residual, torch.tensor([-1, -1]), torch.ones(2), zeros, torch.zeros(1, 2), zeros)
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])
