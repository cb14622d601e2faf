"""The parts of a block: what people call them, and how they are found by these names. Knows nothing of components."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .structure import PREFIX, Stack, widths_of

Side = Literal["input", "output"]
Named = tuple[str, nn.Module]  # a module's path and the module

# what modules are called, in small letters; each is the whole of the last part of a path
ATTENTION = r"(self_?|linear_)?(attn|attention)"
CROSS_ATTENTION = r"(encoder_|cross_?|encdec)(attn|attention)"
MLP = r"(\w+_)?(mlp|feed_?forward|ffn?|densereludense|moe)(_block)?"
UP, DOWN = r"fc1|intermediate", r"fc2|output"  # where a block has no module for the MLP as a whole
ACTIVATION = r"(\w+_)?(act|act_fn|activation|activation_fn|gelu_impl)"
PROJECTIONS = {
    "query": r"q|wq|q_proj|q_b_proj|q_lin|query|query_proj",
    "key": r"k|wk|k_proj|k_lin|key|key_proj",
    "value": r"v|wv|v_proj|v_lin|value|value_proj",
    "output": r"o|wo|o_proj|out_proj|out_lin|c_proj|proj|dense",
    "fused": r"c_attn|wqkv|qkv|qkv_proj|query_key_value|kv_b_proj",
}
# of an MLP; the fused ones have the gate first
MLP_PROJECTIONS = {
    "gate": r"gate_proj|wi_0|w1|linear_gate",
    "up": r"up_proj|wi_1|wi|w3|c_fc|fc1|fc_in|lin1|dense_h_to_4h|linear_up",
    "down": r"down_proj|wo|w2|c_proj|fc2|fc_out|lin2|dense_4h_to_h|linear_down",
    "fused": r"gate_up_proj|wi",
}
EXPERTS = r"(\w+_)?experts?"


@dataclass(frozen=True)
class Columns:
    """Which numbers of a token's state: the same range in each of some equal parts of the last dimension.

    Args:
        start, stop: of the range, counted from where a part begins; `stop` is not in it.
        groups: how many parts there are; with one, the range is one of the whole.
    """

    start: int
    stop: int
    groups: int = 1

    def take(self, h: Tensor) -> Tensor:
        """Return these numbers of `h`, `[..., width]`, those of one part after those of another; a view, with one."""
        if self.groups == 1:
            return h[..., self.start : self.stop]
        return h.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)

    def put(self, h: Tensor, new: Tensor) -> Tensor:
        """Return `h` with these numbers replaced by `new`, `[..., width]`; `h` stays as it is."""
        if self.groups > 1:
            parts, new = h.unflatten(-1, (self.groups, -1)), new.unflatten(-1, (self.groups, -1))
            return Columns(self.start, self.stop).put(parts, new).flatten(-2)
        return torch.cat((h[..., : self.start], new, h[..., self.stop :]), dim=-1)


@dataclass(frozen=True)
class Site:
    """One place to edit.

    Args:
        path: of the module.
        side: its input or its output.
        width: how many numbers of a token's state are edited.
        columns: which of the state's numbers these are; none for all.
        stack: `"encoder"` or `"decoder"`, whose tokens pass there; empty for a model with one kind of tokens.
        input_width: how many numbers the linear layer reads that writes these states; none if it was not asked for.
    """

    path: str
    side: Side
    width: int
    columns: Columns | None = None
    stack: Stack = ""
    input_width: int | None = None


def parts_of(module: Named) -> Iterator[Named]:
    """The modules inside another, at any depth, without those that adapters have hung on them."""
    for name, child in module[1].named_children():
        if not name.startswith(PREFIX):
            yield (part := (f"{module[0]}.{name}", child))
            if widths_of(child) is None:
                yield from parts_of(part)


def inside(module: Named, names: str) -> Named | None:
    """The first module inside another, at any depth, that has one of the names."""
    return next((part for part in parts_of(module) if re.fullmatch(names, name_of(part[0]))), None)


def linear_in(module: Named, names: str) -> tuple[str, tuple[int, int]] | None:
    """The first linear layer inside a module that has one of the names: its path and its widths."""
    for path, found in parts_of(module):
        if re.fullmatch(names, name_of(path)) and (widths := widths_of(found)):
            return path, widths
    return None


def name_of(path: str) -> str:
    """The last part of a path, in small letters."""
    return path.rpartition(".")[2].lower()


def child_of(module: Named, names: str) -> Named | None:
    """The first module directly inside another that has one of the names."""
    for name, found in module[1].named_children():
        if re.fullmatch(names, name.lower()):
            return f"{module[0]}.{name}", found
    return None
