"""Pickles that ask for more memory than they have numbers, or hold what is no tensor."""

import resource
import shutil
import zipfile

import pytest
import torch

import pyreft
from oracle_cases import ORACLE, read_case
from pyreft.files.pickles import read_pickle

ONE = "llama_loreft_l1_one_layer"


def plain():
    return {"weight": torch.randn(4, 32), "bias": torch.randn(4), "embed_dim": torch.tensor(32)}


def deflated(path):
    """Pack zeros: 100 MB in 100 kB."""
    torch.save({"weight": torch.zeros(25_000_000)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)


def saved(tensors):
    return lambda path: torch.save({"bias": torch.ones(2), **tensors()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved(lambda: {"weight": torch.zeros(8).expand(10**9, 8)}), "weight: .* are 32,000,000,000 bytes, and 32 are"),
        (
            saved(lambda: {"weight": torch.zeros(99).as_strided((50, 50), (1, 1))}),
            "weight: .*10,000 bytes, and 396 are",
        ),
        (
            saved(lambda: {"weight": torch.empty(10**9, device="meta")}),
            "weight: expected a plain tensor, found .* on meta",
        ),
        (
            saved(lambda: {"weight": torch.zeros(3, 3).to_sparse()}),
            "weight: expected a plain tensor, found torch.sparse",
        ),
        (
            saved(lambda: {str(n): whole for whole in [torch.zeros(999)] for n in range(99)}),
            "larger than the file, which holds their numbers many times",
        ),
        (saved(lambda: {"weight": torch.full((2,), torch.nan)}), "weight: 2 of 2 numbers are not finite"),
        (
            saved(lambda: {"weight": torch.tensor([1e300], dtype=torch.float64)}),
            "weight: 1 of 1 numbers are not finite",
        ),
        (saved(lambda: {3: torch.ones(2)}), "expected tensors by name, found something else"),
        (lambda path: torch.save(plain(), path, _use_new_zipfile_serialization=False), "the file is damaged, or holds"),
        (deflated, "its parts are compressed or overlap, as torch never writes them"),
        (lambda path: path.mkdir(), "is missing; was the checkpoint copied completely"),
    ],
)
def test_pickles_that_are_refused_before_anything_is_copied(tmp_path, write, message):
    path = tmp_path / "a.bin"
    write(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pyreft.ReftError, match=message):
        read_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_read(tmp_path, kind):
    tensors = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in plain().items()}
    tied = {"tied": tensors["weight"], "turned": tensors["weight"].T, "parameter": torch.nn.Parameter(tensors["bias"])}
    torch.save({**tensors, **tied}, tmp_path / "a.bin")
    found = read_pickle(tmp_path / "a.bin")
    assert found.keys() == {*tensors, *tied}
    for name, tensor in {**tensors, **tied}.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("include_model", [False, True])
def test_parameters_of_another_kind_are_refused(tmp_path, kind, include_model):
    place = shutil.copytree(ORACLE / "legacy" / ONE, tmp_path / ONE)
    model = read_case(ONE)[2]
    if include_model:
        name, weight = next(iter(model.named_parameters()))
        torch.save({name: torch.zeros_like(weight, dtype=kind)}, place / "pytorch_model.bin")
    else:
        (file,) = place.glob("intkey_*.bin")
        tensors = torch.load(file, weights_only=True)
        name = "bias"
        torch.save({**tensors, name: tensors[name].to(kind)}, file)
    with pytest.raises(pyreft.ReftError, match=rf"\.bin: {name}: expected numbers of floating point, got"):
        pyreft.ReftModel.load(place, model, include_model=include_model, act_fn="linear")
    assert not hasattr(model, "peft_config")
