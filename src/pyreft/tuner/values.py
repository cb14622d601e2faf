"""Which numbers an adapter may be made of, wherever they come from, and that its config still says what it is."""

from typing import Any

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


def check_unchanged(adapter_name: str, made: dict[str, Any], says: dict[str, Any]) -> None:
    """Refuse to hand out an adapter whose config was changed since its edits were made, which a change does not reach.

    Args:
        adapter_name: the adapter's.
        made: what the config said then, see `ReftConfig.edits`.
        says: what it says now.

    Raises:
        ReftError: another value of a field; with it, the files would be those of other edits.
    """
    for field, value in made.items():
        if says.get(field) != value:
            raise ReftError(
                f"the edits of {adapter_name!r} were made with {value!r}, and its config was then changed to "
                f"{says.get(field)!r}, which changes nothing in the model. Set it back, or give the new value to a "
                "config of its own: model.add_adapter(name, config).",
                setting=field,
            )
