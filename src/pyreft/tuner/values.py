"""Which numbers an adapter may be made of, wherever they come from."""

import torch
from torch import Tensor

from ..errors import ReftError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_values(name: str, tensor: Tensor, floats: bool = True) -> None:
    """Refuse a tensor that no training leaves behind.

    Args:
        name: the tensor's, with its file if it has one.
        tensor: from a file.
        floats: whether it has to be of floating point, as all parameters of edits are.

    Raises:
        ReftError: another type, or numbers that are not finite in float32.
    """
    if floats and tensor.dtype not in FLOATS:
        raise ReftError(
            f"expected numbers of floating point, got {str(tensor.dtype).removeprefix('torch.')}.", setting=name
        )
    if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.float().isfinite().all()):
        count = int((~tensor.float().isfinite()).sum())
        raise ReftError(
            f"{count} of {tensor.numel()} numbers are not finite (NaN or infinite in float32). The training "
            "diverged, or the file is damaged; take an earlier checkpoint.",
            setting=name,
        )
