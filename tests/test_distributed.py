"""Two processes train the adapter that one process does, each with all of the model or with a part of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent / "train_alone_or_together.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(launcher, directory, batch_size, *shards):
    command = [sys.executable, *launcher, str(PROGRAM), str(directory), str(batch_size), *shards]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(directory / "adapter_model.safetensors"), json.loads((directory / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run([], tmp_path_factory.mktemp("alone"), 8)


@pytest.mark.parametrize("shards", ["", "fsdp", "zero2", "zero3"])
def test_two_processes_equal_one(alone, tmp_path, shards):
    """To 1e-5: the same sums of float32 in another order, over eight steps."""
    if shards.startswith("zero"):
        pytest.importorskip("deepspeed")
    weights, losses = run(TORCHRUN, tmp_path, 4, *filter(None, [shards]))
    assert losses == pytest.approx(alone[1], rel=1e-5)
    assert weights.keys() == alone[0].keys()
    for name, value in alone[0].items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5)
    if not shards:
        assert (tmp_path / "checkpoint-8" / "adapter_config.json").is_file()
