"""An earlier name of `pyreft.files.adapter`."""

from .files.adapter import check_tensors, is_adapter, read_config, read_config_data, read_shapes

__all__ = ["check_tensors", "is_adapter", "read_config", "read_config_data", "read_shapes"]
