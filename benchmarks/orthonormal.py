"""What keeping R orthonormal costs: all layers in one batched QR, against the original's way, layer by layer.

python benchmarks/orthonormal.py
"""

import statistics

import torch
from torch.nn.utils import parametrizations

from _common import paired, report
from pyreft.interventions import LowRankRotateLayer, orthonormalize

WIDTH, RANK, LAYERS, RUNS = 4096, 8, 32, 7


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    ours = [LowRankRotateLayer(WIDTH, RANK) for _ in range(LAYERS)]
    original = parametrizations.orthogonal(torch.nn.Linear(WIDTH, RANK, bias=False))  # as the original does
    target = torch.randn(WIDTH, RANK)

    def all_layers() -> None:
        sum((R.mT * target).sum() for R in orthonormalize(ours).values()).backward()

    def one_original_layer() -> None:
        (original.weight * target.T).sum().backward()

    mine, theirs = paired(all_layers, one_original_layer, runs=RUNS)
    rows = [
        {
            "what": f"forward and backward, width {WIDTH}, rank {RANK}",
            f"ours, {LAYERS} layers (ms)": 1e3 * statistics.median(mine),
            "original, 1 layer (ms)": 1e3 * statistics.median(theirs),
        }
    ]
    report("orthonormal", rows)


if __name__ == "__main__":
    main()
