"""What a call of the model may have, beside the labels, if it is to be computed in part."""

from typing import Any

from torch import Tensor

from ..tuner.call import GIVEN
from .rows import NotExactError

TYPES = "token_type_ids"
BY_TOKEN = ("input_ids", "attention_mask", "position_ids", TYPES)
COUNT = "num_items_in_batch"
FUSED = "fused_lm_head"  # TRL's: the call returns values of the labels alone, zero for tokens without one
_TAKEN = {*BY_TOKEN, *GIVEN, "labels", COUNT, FUSED}
_MORE = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}  # asked for if true


def check_call(call: dict[str, Any]) -> None:
    """Refuse a call that asks for more than can be computed in part, or gives other inputs.

    Raises:
        NotExactError: with what it has or lacks.
    """
    plain = dict.fromkeys(_MORE, False) | {"return_dict": True}
    given = {name for name, value in call.items() if value is not None and plain.get(name) is not value}
    if odd := sorted(given - _TAKEN):
        raise NotExactError(f"the call has {', '.join(odd)}")
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not isinstance(call.get("labels"), Tensor):
        raise NotExactError("the call has no input_ids or no labels")


def columns_of(call: dict[str, Any]) -> int:
    """How many columns a batch has, or would have to come to the last of the positions that are given."""
    positions = call.get("position_ids")
    columns = call["input_ids"].shape[1]
    return columns if positions is None else max(columns, int(positions.max()) + 1)
