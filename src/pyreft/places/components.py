"""Where in a network: from a layer's number and a component's name to a module, its side and its width.

The parts of a block are found by the names that people give them. Knows nothing of edits or tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from torch import nn

from ..errors import ReftError
from .by_path import find_path
from .fused import fused_columns
from .lookup import (
    ACTIVATION,
    ATTENTION,
    CROSS_ATTENTION,
    DOWN,
    EXPERTS,
    MLP,
    MLP_PROJECTIONS,
    PROJECTIONS,
    UP,
    Columns,
    Named,
    Side,
    Site,
    child_of,
    inside,
    linear_in,
    name_of,
)
from .structure import Stack, ancestors, find_blocks, has_stacks, stack_module, states_width, widths_of

COMPONENTS = (
    "block_input",
    "block_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
    "gate_output",
    "up_output",
    "down_output",
    "attention_input",
    "attention_value_output",
    "attention_output",
    "query_output",
    "key_output",
    "value_output",
    "head_attention_value_output",
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "cross_attention_input",
    "cross_attention_output",
)
"""The names of components, without the prefixes `encoder.` and `decoder.`; see `find_site`."""


def number_of_layers(model: nn.Module, component: str | Sequence[str] = "block_output") -> int:
    """How many blocks the model has, in the stack that a component, or the first of several, names."""
    first = component if isinstance(component, str) else component[0]
    return len(find_blocks(model, _read(model, first)[0])[1])


def find_site(
    model: nn.Module, component: str, layer: int | None = None, head: int | None = None, *, linear: bool = False
) -> Site:
    """Return the place that a component names.

    | component | states |
    |---|---|
    | `block_input`, `block_output` | between the blocks |
    | `mlp_input`, `mlp_output`, `mlp_activation` | around the MLP; behind its activation |
    | `gate_output`, `up_output`, `down_output` | of its projections: to what is activated and to what that is \
multiplied with, or to what is activated alone where there is no gate; and back |
    | `attention_input`, `attention_output` | around the attention |
    | `attention_value_output` | the weighted values of all heads: what its output projection takes |
    | `query_output`, `key_output`, `value_output` | of these projections, before any norm or rotation |
    | `head_…` | one head of the last four |
    | `cross_attention_input`, `cross_attention_output` | around the attention to the encoder |

    A part that adds its residual by itself, as in BERT, does so in its output, too. In an encoder-decoder model a
    component is the encoder's, where the prompt is, unless it begins with `decoder.`, as in `decoder.block_output`.

    For an edit that reads what a linear layer read, `attention_output`, `cross_attention_output` and `mlp_output` are
    the output of their last projection, o or down, which in most models is the same states.

    Args:
        model: any network.
        component: one of `COMPONENTS`, with a layer, or the path of a module followed by `.input` or `.output`,
            such as `"model.layers[3].mlp.output"`.
        layer: the number of the block, counted from 0; not needed for a path.
        head: the number of the head, counted from 0, for `head_…` alone. Keys and values have as many heads as the
            model has groups of queries.
        linear: the states must be what a linear layer writes, and its `input_width` is told.

    Raises:
        ReftError: a component, layer or head that the model does not have; the message lists those it has. A part of a
            fused projection where it is not known which columns are whose. Or what no linear layer writes, with
            `linear`.
    """
    if not linear:
        return _find(model, component, layer, head, {})
    return _with_input(model, component, _find(model, component, layer, head, _LAST))


def _find(model: nn.Module, component: str, layer: int | None, head: int | None, instead: dict[str, str]) -> Site:
    """The place that a component names, or that stands `instead` of it."""
    stack, name = _read(model, component)
    if name not in COMPONENTS:
        return find_path(model, component, COMPONENTS)
    path, blocks = find_blocks(model, stack)
    if layer is None or not 0 <= layer < len(blocks):
        which = f"the {stack} of this model" if stack else "this model"
        raise ReftError(f"{which} has the layers 0 to {len(blocks) - 1}, got {layer}.", setting="layer")
    if name.startswith("head_") is (head is None):
        raise ReftError(
            f"{component!r} {'needs the number of a head' if head is None else 'is no single head'}.", setting="head"
        )
    block = _Block(model, component, stack, (f"{path}.{layer}", blocks[layer]))
    return block.find(instead.get(name, name)) if head is None else block.find_head(name.removeprefix("head_"), head)


# the linear layers that write what whole parts do
_LAST = {
    "attention_output": "attention_projection_output",
    "cross_attention_output": "cross_attention_projection_output",
    "mlp_output": "down_output",
}
LINEAR = ("query_output", "key_output", "value_output", "attention_output", "gate_output", "up_output", "mlp_output")
"""The components that are what a linear layer writes, in every model that has them apart."""


def _with_input(model: nn.Module, component: str, site: Site) -> Site:
    """The same place, with the width of what the linear layer there reads."""
    widths = widths_of(model.get_submodule(site.path))
    if site.side != "output" or widths is None:
        raise ReftError(
            f"no linear layer writes {component!r}, so there is no input of one to read. Expected {', '.join(LINEAR)}, "
            "or the path of a linear layer with .output.",
            setting="component",
        )
    return replace(site, input_width=widths[0])


def is_path(component: str) -> bool:
    """Whether a component is the path of a module, which is one place, not the name of a part that each layer has."""
    prefix, _, name = component.rpartition(".")
    return bool(prefix) and not (prefix in ("encoder", "decoder") and name in COMPONENTS)


def _read(model: nn.Module, component: str) -> tuple[Stack, str]:
    """Take the stack off a component's name."""
    prefix, _, name = component.rpartition(".")
    if prefix and not is_path(component):
        stack: Stack = "encoder" if prefix == "encoder" else "decoder"
        stack_module(model, stack)
        return stack, name
    return "encoder" if has_stacks(model) else "", component


class _Block:
    """One block, whose parts are looked up for a component."""

    def __init__(self, model: nn.Module, component: str, stack: Stack, block: Named) -> None:
        self.model = model
        self.component = component
        self.stack = stack
        self.block = block

    def find(self, name: str) -> Site:
        """Return the place of a component that is no single head."""
        part, _, end = name.rpartition("_")
        side: Side = "input" if end == "input" else "output"
        if part == "mlp":
            return self._find_activation() if end == "activation" else self._find_mlp(side)
        if part in ("gate", "up", "down"):
            return self._find_mlp_projection(part)
        if part.endswith("attention_projection"):
            return self._find_last(part)
        if part == "block":
            module = self.block
        elif part == "attention":
            module = self._attention()
        elif part == "cross_attention":
            module = inside(self.block, CROSS_ATTENTION) or self._fail()
        else:
            return self._find_projection(part)
        return self._site(module[0], side, states_width(self.model, module[0]))

    def find_head(self, name: str, head: int) -> Site:
        """Return the place of one head, whose columns are side by side."""
        site, values = self.find(name), self.find("attention_value_output")
        count = self._heads()
        if name in ("key_output", "value_output"):  # fewer, where several queries share them
            count = site.width * count // (self.find("query_output") if name == "key_output" else values).width
        if not 0 <= head < count:
            raise ReftError(f"{self.component!r} has the heads 0 to {count - 1}, got {head}.", setting="head")
        size, among = site.width // count, site.columns or Columns(0, site.width)
        group, number = divmod(head, count // among.groups)
        total = (widths_of(self.model.get_submodule(site.path)) or self._fail())[site.side == "output"]
        start = group * (total // among.groups) + among.start + number * size
        return replace(site, width=size, columns=Columns(start, start + size))

    def _mlp(self) -> tuple[Named, Named]:
        """What the MLP begins and what it ends with; both are the MLP itself where it is one module."""
        if (whole := inside(self.block, MLP)) is not None:
            return whole, whole
        return child_of(self.block, UP) or self._fail(), child_of(self.block, DOWN) or self._fail()

    def _find_mlp(self, side: Side) -> Site:
        first, last = self._mlp()
        path = first[0] if side == "input" else last[0]
        return self._site(path, side, states_width(self.model, path))

    def _find_activation(self) -> Site:
        first, last = self._mlp()
        holders = (first,) if first is last else (first, self.block)
        activation = next((found for holder in holders if (found := child_of(holder, ACTIVATION))), None)
        linears = [widths for module in (last[1], *last[1].children()) if (widths := widths_of(module))]
        if activation is None or not linears:
            self._fail()
        return self._site(activation[0], "output", linears[-1][0])

    def _find_mlp_projection(self, part: str) -> Site:
        first, last = self._mlp()
        if any(re.fullmatch(EXPERTS, name_of(name)) for name, _ in first[1].named_modules()):
            raise ReftError(
                f"{self.component!r}: {first[0]!r} has experts, each with tokens of its own, which cannot be edited "
                "by token; the attention's projections can.",
                setting="component",
            )
        down, (middle, width) = _mlp_linear(last, "down", first is last) or self._fail()
        if part == "down":
            return self._site(down, "output", width)
        fused = _mlp_linear(first, "fused", first is last)
        if fused is not None and fused[1][1] == 2 * middle:
            start = 0 if part == "gate" else middle
            return self._site(fused[0], "output", middle, Columns(start, start + middle))
        path, (_, width) = _mlp_linear(first, part, first is last) or self._fail()
        if width != middle:
            raise ReftError(
                f"{self.component!r} cannot be told in {path!r}, which writes {width} numbers where {down!r} reads "
                f"{middle}. Edit all of it by its path, '{path}.output'.",
                setting="component",
            )
        return self._site(path, "output", width)

    def _find_last(self, part: str) -> Site:
        """What the projection of an attention writes that is its last."""
        cross = part.startswith("cross_")
        attention = (inside(self.block, CROSS_ATTENTION) or self._fail()) if cross else self._attention()
        path, (_, width) = linear_in(attention, PROJECTIONS["output"]) or self._fail()
        return self._site(path, "output", width)

    def _find_projection(self, part: str) -> Site:
        attention = self._attention()
        projection, (values, _) = linear_in(attention, PROJECTIONS["output"]) or self._fail()
        if part == "attention_value":
            return self._site(projection, "input", values)
        own, joined = (linear_in(attention, PROJECTIONS[name]) for name in (part, "fused"))
        beside = [found is not None and _holder(found[0]) == _holder(projection) for found in (own, joined)]
        if own is not None and beside != [False, True]:  # as that of an indexer, which is a part of its own
            return self._site(own[0], "output", own[1][1])
        fused, (_, total) = joined or self._fail()
        if part == "query" and name_of(fused) == "kv_b_proj":
            self._fail()
        holder = self.model.get_submodule(_holder(fused))
        columns = fused_columns(self.component, fused, holder, total, values)[part]
        return self._site(fused, "output", (columns.stop - columns.start) * columns.groups, columns)

    def _attention(self) -> Named:
        """The attention of a token to its own stack: by its name, or as what holds the queries."""
        if (found := inside(self.block, ATTENTION)) is not None:
            return found
        query, _ = linear_in(self.block, PROJECTIONS["query"]) or self._fail()
        path = query.rpartition(".")[0]
        return path, self.model.get_submodule(path)

    def _heads(self) -> int:
        """How many heads the queries have."""
        for module in (*self._attention()[1].modules(), *ancestors(self.model, self.block[0])):
            for name in ("num_heads", "num_attention_heads", "n_heads"):
                for owner in (module, getattr(module, "config", None)):
                    if isinstance(count := getattr(owner, name, None), int):
                        return count
        self._fail()

    def _site(self, path: str, side: Side, width: int, columns: Columns | None = None) -> Site:
        return Site(path, side, width, columns, self.stack)

    def _fail(self) -> NoReturn:
        path, block = self.block
        raise ReftError(
            f"{self.component!r} was not found in layer {path.rpartition('.')[2]} of "
            f"{type(self.model).__name__}, whose parts are {', '.join(name for name, _ in block.named_children())}. "
            f"Give a module's path, such as '{path}.<part>.output'. Every layer has 'block_output', which the formula "
            "'loreft' and others edit.",
            setting="component",
        )


def _holder(path: str) -> str:
    """The path of the module that a module is directly in."""
    return path.rpartition(".")[0]


def _mlp_linear(module: Named, part: str, whole: bool) -> tuple[str, tuple[int, int]] | None:
    """A linear layer of an MLP; where that is no module as a `whole`, the one that its first or last part is or has."""
    if whole:
        return linear_in(module, MLP_PROJECTIONS[part])
    if part not in ("up", "down"):
        return None
    return (module[0], found) if (found := widths_of(module[1])) else linear_in(module, "dense")
