"""What a base model computes rests on: which of it is frozen, and whether it is still what it was.

Knows modules and parameters; nothing of tokens or of what is stored.
"""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..sharded import is_sharded
from ..tuner.layer import ReftLayer

_ROW = 8192  # bytes
_ROPE_BY_LENGTH = ("dynamic", "longrope")  # whose angles change where a row exceeds the original context


def outside_of_edits(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it, but for the interventions."""
    yield module
    for child in module.children():
        if not isinstance(child, ReftLayer):
            yield from outside_of_edits(child)


def own_tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    """The parameters and buffers of modules that are here, not offloaded; of quantised ones what they are made of."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield from _plain(tensor)


def _plain(tensor: Any) -> Iterator[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        if not tensor.is_meta:
            yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a sharded one has its mesh of devices, too
            yield from _plain(part)


def state_of(modules: list[nn.Module]) -> tuple:
    """What changes when a base model is changed in place: its tensors, and the other adapters that act in it.

    PyTorch counts what is written to a tensor. What goes around that count, as `parameter.data.add_` does, is found
    by `sums_of`.
    """
    tensors = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in own_tensors(modules)]
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, _facts(module))
        for module in modules
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    return hash(tuple(tensors)), tuple(adapters)


def _facts(layer: Any) -> str:
    """What an adapter's layer computes with beside its tensors."""
    return f"{getattr(layer, 'merged_adapters', None)} {getattr(layer, 'scaling', None)}"


@torch.no_grad()
def sums_of(modules: list[nn.Module]) -> str:
    """A digest of sums of the bits of every tensor, to find changes that were made around PyTorch's count.

    The bits, in rows of 1024 numbers, are summed along and across, where they are: an accelerator hands over little.
    """
    digest = xxhash.xxh3_128()
    for tensor in own_tensors(modules):
        bits = _bits(tensor)
        whole = len(bits) // _ROW * _ROW
        table = bits[:whole].view(torch.int64).view(-1, _ROW // 8)
        digest.update(torch.cat((table.sum(0), table.sum(1), bits[whole:].long())).cpu().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def fingerprint(modules: list[nn.Module], config: Any) -> str:
    """A digest of every value of a base model and of its settings, which tells it from others in later runs."""
    digest = xxhash.xxh3_128()
    digest.update(repr(sorted(config.to_dict().items(), key=str)).encode())
    for tensor in own_tensors(modules):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(_bits(tensor).cpu().numpy().data)
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.clone() if flat.storage_offset() % 8 else flat


def why_not_frozen(modules: list[nn.Module], config: Any) -> str | None:
    """Why parts of a forward of this base model would differ when they are computed apart, if they would."""
    for module in modules:
        if any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None):
            return f"parameters of the base model are trained (in {type(module).__name__})"
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return "the base model has dropout in training; load it with a config in which it is 0"
        if any(is_sharded(parameter) for parameter in module._parameters.values()):
            return "the parameters of the base model are sharded"
        if any(parameter.is_meta for parameter in module._parameters.values() if parameter is not None):
            return "parameters of the base model are offloaded"
    for name, value in _numbers(config):
        if modules[0].training and value > 0 and "drop" in name and not name.startswith(("classifier", "summary")):
            return f"the base model has dropout in training ({name} = {value}); load it with 0"
        if name == "output_router_logits" and value:
            return "the loss has a term for the routing of every token to its experts (output_router_logits)"
    return None


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """All numbers in a config, those of inner configs included."""
    entries = [config.to_dict()] if config is not None else []
    while entries:
        for name, value in entries.pop().items():
            if isinstance(value, dict):
                entries.append(value)
            elif isinstance(value, int | float):
                yield str(name), float(value)


def longest_plain_row(config: Any) -> int | None:
    """Up to how many tokens a position's angles are the same in every row; none for any number."""
    limits = []
    entries = [config.to_dict()] if config is not None else []
    while entries:
        entry = entries.pop()
        if entry.get("rope_type") in _ROPE_BY_LENGTH:
            known = entry.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
            limits.append(int(known))
        entries += [value for value in entry.values() if isinstance(value, dict)]
    return min(limits, default=None)
