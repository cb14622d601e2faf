"""The numbers in the tensors of modules, and whether they are still the same.

Told in each step by which storage a tensor has, by PyTorch's count of what was written to it, and, for what goes around
that count as `tensor.data.mul_` does, by a few of its numbers; once an epoch by sums over all bits.
"""

import operator
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

_SPOTS = 8  # numbers of each tensor that are looked at in each step
_ROW = 8192  # bytes
_SAMPLES = 1024  # numbers of each parameter that tell a base model from another


class Values:
    """The tensors of some modules at the moment.

    Args:
        modules: which.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._tensors = list(_own_tensors(modules))
        self._storages = [_storage(tensor) for tensor in self._tensors]
        self._counts, self._spots = self._count(), self._choose_spots()
        self._seen = self._look()
        self._sums = self.sums()

    def is_same(self) -> bool:
        """Whether no tensor was written to or got another storage since, as far as a step can tell."""
        # a storage that nothing uses any more leaves a dead reference, so a new one at its address is told from it
        return (
            all(known() is not None for known in self._storages)
            and self._count() == self._counts
            and all(map(torch.equal, self._look(), self._seen))
        )

    def is_same_to_the_bit(self) -> bool:
        """Whether also the sums over all bits are the same."""
        return self.is_same() and self.sums() == self._sums

    def are(self, modules: list[nn.Module]) -> bool:
        """Whether these are the tensors of these modules."""
        found = list(_own_tensors(modules))
        return len(found) == len(self._tensors) and all(map(operator.is_, found, self._tensors))

    def _count(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in self._tensors]

    def _choose_spots(self) -> list[list[tuple]]:
        """By type and device, the arguments of `torch.as_strided` for a few numbers of each tensor."""
        spots: dict[tuple, list[tuple]] = {}
        for tensor in self._tensors:
            size = tensor.numel()
            if size and tensor.is_contiguous():
                count = min(size, _SPOTS)
                spot = tensor, (count,), (size // count,), tensor.storage_offset()
                spots.setdefault((tensor.dtype, tensor.device), []).append(spot)
        return list(spots.values())

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        return [torch.cat([torch.as_strided(*spot) for spot in group]).view(torch.uint8) for group in self._spots]

    @torch.no_grad()
    def sums(self) -> str:
        """A digest of sums of the bits of every tensor, to find changes that were made around PyTorch's count.

        The bits, in rows of 1024 numbers, are summed along and across, where they are: an accelerator hands over
        little.
        """
        digest = xxhash.xxh3_128()
        for tensor in self._tensors:
            bits = _bits(tensor)
            whole = len(bits) // _ROW * _ROW
            table = bits[:whole].view(torch.int64).view(-1, _ROW // 8)
            digest.update(torch.cat((table.sum(0), table.sum(1), bits[whole:].long())).cpu().numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A digest of every number, which tells a base model from others in later runs, and of what computes."""
        digest = xxhash.xxh3_128(f"{torch.__version__} {transformers.__version__}".encode())
        for tensor in self._tensors:
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(_bits(tensor).cpu().numpy().data)
        return digest.hexdigest()


@torch.no_grad()
def sample(parameters: Iterable[Tensor]) -> str:
    """A digest of some numbers of each parameter, in bfloat16: the same on any device, and in any type not below it.

    Those that are offloaded are left out.
    """
    digest = xxhash.xxh3_128()
    for tensor in (part for parameter in parameters for part in _plain(parameter)):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLES)]
        some = some.to(torch.bfloat16) if some.is_floating_point() else some
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(_bits(some).cpu().numpy().data)
    return digest.hexdigest()


def _own_tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Parameters, buffers and other tensors that are here, not offloaded; of quantised ones what they are made of."""
    for module in modules:
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and name != "rope_deltas":
                    yield from _plain(tensor)


def _plain(tensor: Any) -> Iterator[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        if not tensor.is_meta:
            yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a sharded one has its mesh of devices, too
            yield from _plain(part)


def _storage(tensor: Tensor) -> weakref.ref:
    return weakref.ref(tensor.untyped_storage())


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.clone() if flat.storage_offset() % 8 else flat
