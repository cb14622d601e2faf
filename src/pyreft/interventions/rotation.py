"""R: matrices with orthonormal columns, kept so whatever the optimiser does, and computed for many layers at once."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..sharded import is_sharded


def orthonormal_columns(free: Tensor) -> Tensor:
    """Map free matrices `[..., d, r]` to the matrices of the same shape with orthonormal columns, in float32.

    The Q of a QR decomposition with a positive diagonal of R: a smooth, unique map that leaves a matrix with
    orthonormal columns as it is. Matrices of one shape go through one batched call.
    """
    q, r = torch.linalg.qr(free.float())
    return q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


class LowRankRotateLayer(nn.Module):
    """R, kept as `weight` `[d, r]` with orthonormal columns whatever the optimiser does to the `free` parameter."""

    def __init__(self, embed_dim: int, low_rank_dimension: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(embed_dim, low_rank_dimension))
        if not self.free.is_meta:
            nn.init.orthogonal_(self.free)
        self.kept: tuple[Tensor, tuple] | None = None  # R, and the state of the parameter that it was computed from

    def _state(self) -> tuple:
        return self.free._version, self.free.data_ptr(), self.free.device

    @property
    def weight(self) -> Tensor:
        """R as `[d, r]`, float32; in evaluation it is computed once and kept until the parameter changes."""
        if torch.compiler.is_compiling():  # what is kept between forwards is no part of a graph
            return orthonormal_columns(self.free)
        if self.kept is not None and self.kept[1] == self._state():
            return self.kept[0]
        with _outliving_inference():
            value = orthonormal_columns(self.free)
        if not value.requires_grad and not self.training:
            self.keep(value)
        return value

    def keep(self, value: Tensor) -> None:
        """Serve this R, computed from the parameter as it is now (see `orthonormalize`), until `forget`."""
        self.kept = value, self._state()

    def forget(self) -> None:
        """Drop a kept R, so that the next use computes it anew."""
        self.kept = None

    def forget_graph(self) -> None:
        """Drop a kept R that belongs to the autograd graph of one step."""
        if self.kept is not None and self.kept[0].requires_grad:
            self.forget()

    def train(self, mode: bool = True) -> "LowRankRotateLayer":
        self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict:  # a kept R belongs to one forward and its graph: copies and pickles go without
        return {**self.__dict__, "kept": None}

    def stacked(self, rotations: "Sequence[LowRankRotateLayer]") -> "LowRankRotateLayer":
        """Return a layer whose `weight` has the R of each of these, `[rows, d, r]`."""
        made = copy.copy(self)
        made.keep(torch.stack([rotation.weight.mT for rotation in rotations]).mT)  # products want rows of R in a row
        return made

    @torch.no_grad()
    def set_(self, rotation: Tensor) -> None:
        """Set R to a `[d, r]` matrix with orthonormal columns."""
        self.free.copy_(rotation)
        self.forget()

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def orthonormalize(rotations: Sequence[LowRankRotateLayer]) -> None:
    """Compute the R of many layers, all of the same shape and device in one batched call, and keep them.

    Those of sharded parameters are left to their layers, in whose forward they are whole.
    """
    groups: dict[tuple, list[LowRankRotateLayer]] = {}
    for rotation in rotations:
        if is_sharded(rotation.free):
            continue
        if torch.is_grad_enabled() and rotation.free.requires_grad:
            rotation.forget()
        elif rotation.kept is not None and rotation.kept[1] == rotation._state():
            continue
        groups.setdefault((rotation.free.shape, rotation.free.device), []).append(rotation)
    for group in groups.values():
        with _outliving_inference():
            stacked = orthonormal_columns(torch.stack([rotation.free.float() for rotation in group]))
        for rotation, value in zip(group, stacked.unbind(), strict=True):
            rotation.keep(value)


@contextmanager
def _outliving_inference() -> Iterator[None]:
    """What is kept from an inference may stand in the graph of a later step, where tensors of inference mode cannot."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
