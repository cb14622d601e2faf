"""R: matrices with orthonormal columns, kept so whatever the optimiser does, and computed for many layers at once."""

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from ..sharded import is_sharded


def orthonormal_columns(free: Tensor) -> Tensor:
    """Map free matrices `[..., d, r]` to the matrices of the same shape with orthonormal columns, in float32.

    The Q of a QR decomposition with a positive diagonal of R: a smooth, unique map that leaves a matrix with
    orthonormal columns as it is. Matrices of one shape go through one batched call.
    """
    q, r = torch.linalg.qr(free.float())
    return q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


class OrthonormalColumns(nn.Module):
    """R, as `weight` `[d, r]` with orthonormal columns whatever the optimiser does to the `free` parameter.

    It is computed from the parameter each time it is asked for; who needs it often asks once, see `orthonormalize`.
    """

    def __init__(self, embed_dim: int, low_rank_dimension: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(embed_dim, low_rank_dimension, dtype=torch.float32))
        if not self.free.is_meta:
            nn.init.orthogonal_(self.free)

    @property
    def weight(self) -> Tensor:
        """The matrix with orthonormal columns, `[d, r]`, in float32."""
        return orthonormal_columns(self.free)

    @weight.setter
    def weight(self, rotation: Tensor) -> None:
        self.set_(rotation)

    @torch.no_grad()
    def set_(self, rotation: Tensor) -> None:
        """Set R to a `[d, r]` matrix with orthonormal columns."""
        self.free.copy_(rotation)

    def forward(self, h: Tensor) -> Tensor:
        return h.to(torch.float32) @ self.weight


def orthonormalize(
    rotations: Sequence[OrthonormalColumns], known: Container[OrthonormalColumns] = ()
) -> dict[OrthonormalColumns, Tensor]:
    """Return R, `[r, d]`, of many layers, all of the same shape and device computed in one batched call.

    Those that are known, and those of sharded parameters, which are whole only in their layer's forward, are left out.
    """
    groups: dict[tuple, list[OrthonormalColumns]] = {}
    for rotation in dict.fromkeys(rotations):
        if rotation not in known and not is_sharded(rotation.free):
            groups.setdefault((rotation.free.shape, rotation.free.device), []).append(rotation)
    found: dict[OrthonormalColumns, Tensor] = {}
    for group in groups.values():
        stacked = orthonormal_columns(torch.stack([rotation.free.float() for rotation in group]))
        found |= zip(group, stacked.mT.unbind(), strict=True)
    return found
