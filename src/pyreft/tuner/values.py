"""Which numbers an adapter may be made of, wherever they come from, and tensors that a later step can use."""

from typing import Any, cast

import torch
from torch import Tensor, nn

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


def leave_inference(model: nn.Module) -> None:
    """Replace parameters and buffers that were made in `torch.inference_mode()`, which no later step can train on.

    Those that several modules share stay shared; those of a class of their own, as of quantised weights, stay.
    """
    made: dict[int, tuple[Tensor, Any]] = {}  # by its id, one that was replaced, which stays alive, and its copy
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if type(tensor) not in (Tensor, nn.Parameter) or not cast(Tensor, tensor).is_inference():
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = cast(Tensor, tensor), _copy(cast(Tensor, tensor))
                    held[name] = made[id(tensor)][1]


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
