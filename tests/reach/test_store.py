"""What is held for later steps comes back bit for bit, or not at all."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pyreft
from conftest import tiny_llama
from pyreft.reach import Reach
from pyreft.reach import store as storing
from pyreft.reach.store import Store, read_budget
from reaching import LENGTHS, adapt, assert_exact, batch_of, loss_and_gradients, rows_of

KEY, OTHER = b"0" * 16, b"1" * 16
BATCH = batch_of(rows_of(*LENGTHS), "left")


def tensors(count=2, size=100):
    return [torch.randn(size) for _ in range(count)]


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("given", "bytes_"), [(0, 0), (1234, 1234), ("1234", 1234), ("4GB", 4 * 10**9), ("1.5 mb", 1_500_000)]
)
def test_a_budget(given, bytes_):
    assert read_budget(given) == bytes_


@pytest.mark.parametrize("given", [-1, "much", "4 G", ""])
def test_a_budget_that_is_none(given):
    with pytest.raises(pyreft.ReftError, match="expected a number of bytes from 0 on, or text such as '4GB', got"):
        Reach(adapt(tiny_llama()), memory=given)


def test_processes_share_the_free_memory(monkeypatch):
    monkeypatch.setattr(storing, "free_memory", lambda: 1000)
    assert read_budget(None) == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_budget(None) == 125


def test_what_is_full_keeps_what_it_has_until_an_epoch_does_without():
    store = Store(2000)
    first, second = tensors(), tensors()  # 800 bytes each
    store.put(KEY, first)
    store.put(OTHER, second)
    store.put(b"2" * 16, tensors())
    assert store.full
    assert len(store) == 2
    assert store.held == 1600
    for _ in range(2):
        store.new_epoch()
        assert equal(store.get(KEY), first)
    store.put(b"2" * 16, first)
    assert store.get(OTHER) is None
    assert equal(store.get(b"2" * 16), first)
    assert store.held == 1600


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_what_was_put_in(tmp_path, dtype):
    values = [torch.randn(3, 5, dtype=dtype), torch.randn(7, 2, dtype=dtype).T]
    Store(0, tmp_path).put(KEY, values)
    found = Store(0, tmp_path).get(KEY)
    assert equal(found, values)
    assert found[0].dtype == dtype


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "a bit":
        data[-3] ^= 4
    elif how == "cut short":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "another's":
        save_file({"0": torch.zeros(3)}, path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["a bit", "cut short", "empty", "another's"])
def test_a_damaged_file_is_removed_and_computed_again(tmp_path, how):
    adapted = adapt(tiny_llama())
    loss_and_gradients(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)
    for path in (files := sorted(tmp_path.iterdir())):
        damage(path, how)
    reach = Reach(adapted, memory=0, directory=tmp_path)
    with pytest.warns(UserWarning, match=r"\.safetensors: damaged .*; it is removed and computed again"):
        assert_exact(reach, adapted, BATCH)
    assert sorted(tmp_path.iterdir()) == files
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)


@pytest.mark.parametrize("memory", [0, 2000])
def test_what_does_not_fit_goes_to_disk_and_serves_a_later_run(tmp_path, memory):
    adapted = adapt(tiny_llama())
    reach = Reach(adapted, memory=memory, directory=tmp_path)
    assert_exact(reach, adapted, BATCH)
    assert reach.store.held <= memory
    assert reach.store.on_disk == len(list(tmp_path.iterdir()))
    assert f"{reach.store.on_disk} more on disk" in reach.describe()
    later = Reach(adapt(tiny_llama(), seed=7), memory=memory, directory=tmp_path)
    assert_exact(later, later.model, BATCH)
    assert later.store.on_disk == 0
    assert later.store.missed == len(reach.store)  # what was held in memory alone


@pytest.mark.parametrize("changed", ["weights", "settings"])
def test_files_of_another_model_are_not_used(tmp_path, changed):
    adapted = adapt(tiny_llama())
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)
    count = len(list(tmp_path.iterdir()))
    base = tiny_llama(**({"rms_norm_eps": 0.1} if changed == "settings" else {}))
    if changed == "weights":
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other = adapt(base)
    assert_exact(Reach(other, memory=0, directory=tmp_path), other, BATCH)
    assert len(list(tmp_path.iterdir())) == 2 * count


def test_nothing_is_held_without_memory():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted, memory=0)
    assert_exact(reach, adapted, BATCH)
    assert len(reach.store) == reach.store.held == 0
    assert "held are 0 prefixes and states in 0.0 of 0 MB; what does not fit is computed again." in reach.describe()


def test_a_directory_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(pyreft.ReftError, match="expected a directory that can be written, for what does not fit"):
        Reach(adapt(tiny_llama()), directory=path / "below")
    with pytest.raises(pyreft.ReftError, match=r"\(File exists\)"):
        Reach(adapt(tiny_llama()), directory=path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_writing_and_not_the_training(tmp_path, monkeypatch):
    adapted = adapt(tiny_llama())
    reach = Reach(adapted, memory=0, directory=tmp_path)
    before = batch_of(rows_of(5, 6), "left")
    assert_exact(reach, adapted, before)
    written = len(list(tmp_path.iterdir()))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"the beginning")
        with open("/dev/full", "wb") as file:
            file.write(bytes(1 << 20))

    monkeypatch.setattr(storing, "save_file", full)
    with pytest.warns(UserWarning, match="nothing more is kept there: the disk is full. It is computed again"):
        assert_exact(reach, adapted, BATCH)
    assert len(list(tmp_path.iterdir())) == written
    assert reach.store.full
    missed = reach.store.missed
    assert_exact(reach, adapted, before)  # what was written is still read
    assert reach.store.missed == missed


def test_a_directory_that_vanishes(tmp_path):
    adapted = adapt(tiny_llama())
    reach = Reach(adapted, memory=0, directory=tmp_path / "store")
    (tmp_path / "store").rmdir()
    with pytest.warns(UserWarning, match="nothing more is kept there"):
        assert_exact(reach, adapted, BATCH)


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pyreft.reach import store as storing
from conftest import tiny_llama
from reaching import *
from pyreft.reach import Reach

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what runs in the background

def interrupted(tensors, path, metadata):
    with open(path, "wb") as file:
        file.write(b"the beginning")
    os.kill(os.getpid(), signal.{signal})

storing.save_file = interrupted
Reach(adapt(tiny_llama()), memory=0, directory={directory!r})(**batch_of(rows_of(*LENGTHS), "left"))
"""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_a_run_that_ends_while_it_writes(tmp_path, sent):
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), signal=sent, directory=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert ("KeyboardInterrupt" in ended.stderr) == (sent == "SIGINT")
    left = list(tmp_path.iterdir())
    assert [path.suffix for path in left] == ([".part"] if sent == "SIGKILL" else [])
    adapted = adapt(tiny_llama())
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)
    for path in left:
        assert path.exists()  # another process may be writing it
        os.utime(path, (time.time() - 10_000,) * 2)
        Reach(adapted, directory=tmp_path)
        assert not path.exists()


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    adapted = adapt(tiny_llama())
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)

    def unreadable(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    reach = Reach(adapted, memory=0, directory=tmp_path)
    monkeypatch.setattr(storing, "safe_open", unreadable)
    with pytest.warns(UserWarning, match=r"Input/output error.*computed again"):
        assert_exact(reach, adapted, BATCH)


def test_unfinished_files_of_others_stay(tmp_path):
    foreign = tmp_path / "holiday.part"
    foreign.write_bytes(b"x")
    os.utime(foreign, (time.time() - 10_000,) * 2)
    Reach(adapt(tiny_llama()), directory=tmp_path)
    assert foreign.exists()


def test_what_cannot_be_removed_is_computed_again(tmp_path):
    adapted = adapt(tiny_llama())
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)
    for path in list(tmp_path.iterdir()):
        path.unlink()
        path.mkdir()
    with pytest.warns(UserWarning, match="computed again"):
        assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, BATCH)
