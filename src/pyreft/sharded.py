"""Parameters of which a process has only a part, as with FSDP or DeepSpeed."""

from typing import Any

_MARKS = ("ds_id", "placements", "_is_flat_param", "_fsdp_flattened")  # of DeepSpeed, FSDP2 and FSDP1


def is_sharded(parameter: Any) -> bool:
    """Whether a process has only a part of a parameter now: with FSDP or DeepSpeed, outside of its module's forward."""
    return any(hasattr(parameter, mark) for mark in _MARKS)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter when it is whole; DeepSpeed ZeRO-3 leaves an empty one in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
