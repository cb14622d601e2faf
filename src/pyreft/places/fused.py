"""Queries, keys and values that one projection writes: which of its columns are whose.

Neither its name nor its shape tells that; a model's code does, by which the table was written. What is not known is
not guessed.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import nn

from ..errors import ReftError
from .lookup import Columns

# the classes of transformers in which queries, keys and values alternate: how often
_GROUPS: dict[str, Callable[[Any], int]] = {
    "BloomAttention": attrgetter("num_heads"),
    "CodeGenAttention": lambda _: 4,  # for the cores of a TPU, however many heads there are
    "FalconAttention": lambda one: (
        one.num_kv_heads if one.new_decoder_architecture else 1 if one.multi_query else one.num_heads
    ),
    "GPTBigCodeAttention": lambda one: 1 if one.multi_query else one.num_heads,
    "GPTNeoXAttention": attrgetter("config.num_attention_heads"),
    "GPTNeoXJapaneseAttention": attrgetter("num_attention_heads"),
    "MiniMaxLightningAttention": attrgetter("num_attention_heads"),
    "PersimmonAttention": attrgetter("num_heads"),
}
_ORDER = {"CodeGenAttention": ("query", "value", "key")}
# the names under which all others have them side by side, in the order of the name
_SIDE_BY_SIDE = ("Wqkv", "c_attn", "qkv", "qkv_proj")


def fused_columns(component: str, path: str, attention: nn.Module, total: int, values: int) -> dict[str, Columns]:
    """Return the columns of queries, keys and values in a projection.

    Args:
        component: for which they are asked.
        path: of the projection.
        attention: the module that has it, and takes apart what it writes.
        total: how many numbers it writes.
        values: how many the weighted values of all heads are; the queries are as many.

    Raises:
        ReftError: it is not known which they are, or no edit of them would last.
    """
    holder, _, name = path.rpartition(".")
    if name == "kv_b_proj":
        raise ReftError(
            f"{component!r} cannot be edited in {path!r}: the cache holds what it reads, of which it makes keys and "
            f"values anew at each step. Edit that, as '{holder}.kv_a_layernorm.output', or 'block_output', "
            "with the formula 'loreft' or others.",
            setting="component",
        )
    classes = [cls.__name__ for cls in type(attention).__mro__ if cls.__module__.startswith("transformers.")]
    known = next((cls for cls in classes if cls in _GROUPS), "")
    if not known and not _is_side_by_side(name, attention):
        raise ReftError(
            f"{component!r} has no columns that are known in {path!r}: how {type(attention).__name__} takes queries, "
            f"keys and values apart is not. Edit all of it by its path, '{path}.output'.",
            setting="component",
        )
    groups = _GROUPS[known](attention) if known else 1
    shared = (total - values) // 2  # between keys and values
    sizes, columns, start = {"query": values, "key": shared, "value": shared}, {}, 0
    for part in _ORDER.get(known, sizes):
        columns[part] = Columns(start, start + sizes[part] // groups, groups)
        start = columns[part].stop
    return columns


def _is_side_by_side(name: str, attention: nn.Module) -> bool:
    """Whether the projection of an attention that is not in the table is what its name says."""
    if name == "qkv_proj" and not hasattr(attention, "num_key_value_heads"):  # as where it was taken from CodeGen
        return False
    return name in _SIDE_BY_SIDE and getattr(attention, "multi_query", True)
