"""Parameters of which a process has only a part, as with FSDP or DeepSpeed."""

from typing import Any


def is_sharded(parameter: Any) -> bool:
    """Whether a process has only a part of a parameter now: with FSDP or DeepSpeed, outside of its module's forward."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "placements") or hasattr(parameter, "_is_flat_param")


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter when it is whole; DeepSpeed ZeRO-3 leaves an empty one in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
