"""Two processes train the adapter that one process does."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent / "train_alone_or_together.py"


def run(launcher, directory, batch_size):
    command = [sys.executable, *launcher, str(PROGRAM), str(directory), str(batch_size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(directory / "adapter_model.safetensors")


def test_two_processes_equal_one(tmp_path):
    """To 1e-5: the same sums of float32 in another order, over eight steps."""
    alone = run([], tmp_path / "alone", 8)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    together = run(torchrun, tmp_path / "together", 4)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "together" / "checkpoint-8" / "adapter_config.json").is_file()
