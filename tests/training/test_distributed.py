"""Two processes train the adapter that one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_llama

PROGRAM = Path(__file__).parent / "train_alone_or_together.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def launch(launcher, *arguments):
    command = [sys.executable, *launcher, str(PROGRAM), *map(str, arguments)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def run(launcher, *arguments):
    """Return the adapter and the losses."""
    result = launch(launcher, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    directory = arguments[1]
    return load_file(directory / "adapter_model.safetensors"), json.loads((directory / "losses.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tiny_llama().save_pretrained(directory := tmp_path_factory.mktemp("base"))
    return directory


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    return run(launcher, base, tmp_path_factory.mktemp("alone"), 8)


@pytest.mark.parametrize("way", ["", "fsdp", "zero2", "zero3"])
def test_two_processes_equal_one(base, alone, tmp_path, way):
    """To 1e-5: the same sums of float32 in another order, over eight steps."""
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    adapter, losses = run(TORCHRUN, base, tmp_path, 4, *filter(None, [way]))
    expected, expected_losses = alone
    assert len(losses) == 8
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(adapter[name], value, atol=1e-5, rtol=1e-5)
    assert way == "fsdp" or (tmp_path / "checkpoint-8" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("train", "train_dataset: the processes have different data: 32 rows in process 0, 32 rows in process 1"),
        ("apart", "2 processes were launched, and each would train alone. On CPUs, TrainingArguments(use_cpu=True)"),
        ("eval", "eval_dataset['unseen']: the processes have different data: 8 rows in process 0, 7 rows in process 1"),
    ],
)
def test_processes_that_cannot_train_together_do_not_begin(base, tmp_path, data, message):
    result = launch(TORCHRUN, base, tmp_path, 4, data)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "losses.json").exists()
