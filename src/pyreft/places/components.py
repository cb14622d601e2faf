"""Where in a network: from a layer's number and a component's name to a module, its side and its width.

The parts of a block are found by the names that people give them. Knows nothing of edits or tokens.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from torch import nn

from ..errors import ReftError, did_you_mean
from ..sharded import shape_of
from .structure import (
    PREFIX,
    Stack,
    ancestors,
    find_blocks,
    has_stacks,
    path_of,
    stack_module,
    states_width,
    widths_of,
)

Side = Literal["input", "output"]
Named = tuple[str, nn.Module]  # a module's path and the module

COMPONENTS = (
    "block_input",
    "block_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
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

# what modules are called, in small letters; each is the whole of the last part of a path
_ATTENTION = r"(self_?|linear_)?(attn|attention)"
_CROSS_ATTENTION = r"(encoder_|cross_?|encdec)(attn|attention)"
_MLP = r"(\w+_)?(mlp|feed_?forward|ffn?|densereludense|moe)(_block)?"
_UP, _DOWN = r"fc1|intermediate", r"fc2|output"  # where a block has no module for the MLP as a whole
_ACTIVATION = r"(\w+_)?(act|act_fn|activation|activation_fn|gelu_impl)"
_PROJECTIONS = {
    "query": r"q|wq|q_proj|q_b_proj|q_lin|query|query_proj",
    "key": r"k|wk|k_proj|k_lin|key|key_proj",
    "value": r"v|wv|v_proj|v_lin|value|value_proj",
    "output": r"o|wo|o_proj|out_proj|out_lin|c_proj|proj|dense",
    "fused": r"c_attn|wqkv|qkv|qkv_proj|query_key_value|kv_b_proj",
}


@dataclass(frozen=True)
class Site:
    """One place to edit.

    Args:
        path: of the module.
        side: its input or its output.
        width: how many numbers of a token's state are edited.
        columns: which of them, from start to before stop of the last dimension; none for all.
        stack: `"encoder"` or `"decoder"`, whose tokens pass there; empty for a model with one kind of tokens.
    """

    path: str
    side: Side
    width: int
    columns: tuple[int, int] | None = None
    stack: Stack = ""


def number_of_layers(model: nn.Module, component: str = "block_output") -> int:
    """How many blocks the model has, in the stack that the component names."""
    return len(find_blocks(model, _read(model, component)[0])[1])


def find_site(model: nn.Module, component: str, layer: int | None = None, head: int | None = None) -> Site:
    """Return the place that a component names.

    | component | states |
    |---|---|
    | `block_input`, `block_output` | between the blocks |
    | `mlp_input`, `mlp_output`, `mlp_activation` | around the MLP; behind its activation |
    | `attention_input`, `attention_output` | around the attention |
    | `attention_value_output` | the weighted values of all heads: what its output projection takes |
    | `query_output`, `key_output`, `value_output` | of these projections, before any norm or rotation |
    | `head_…` | one head of the last four |
    | `cross_attention_input`, `cross_attention_output` | around the attention to the encoder |

    A part that adds its residual by itself, as in BERT, does so in its output, too. In an encoder-decoder model a
    component is the encoder's, where the prompt is, unless it begins with `decoder.`, as in `decoder.block_output`.

    Args:
        model: any network.
        component: one of `COMPONENTS`, with a layer, or the path of a module followed by `.input` or `.output`,
            such as `"model.layers[3].mlp.output"`.
        layer: the number of the block, counted from 0; not needed for a path.
        head: the number of the head, counted from 0, for `head_…` alone. Keys and values have as many heads as the
            model has groups of queries.

    Raises:
        ReftError: a component, layer or head that the model does not have; the message lists those it has.
    """
    stack, name = _read(model, component)
    if name not in COMPONENTS:
        return _find_path(model, component)
    path, blocks = find_blocks(model, stack)
    if layer is None or not 0 <= layer < len(blocks):
        which = f"the {stack} of this model" if stack else "this model"
        raise ReftError(f"{which} has the layers 0 to {len(blocks) - 1}, got {layer}.", setting="layer")
    if name.startswith("head_") is (head is None):
        raise ReftError(
            f"{component!r} {'needs the number of a head' if head is None else 'is no single head'}.", setting="head"
        )
    block = _Block(model, component, stack, (f"{path}.{layer}", blocks[layer]))
    return block.find(name) if head is None else block.find_head(name.removeprefix("head_"), head)


def _read(model: nn.Module, component: str) -> tuple[Stack, str]:
    """Take the stack off a component's name."""
    prefix, _, name = component.rpartition(".")
    if prefix in ("encoder", "decoder") and name in COMPONENTS:
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
        if part == "block":
            module = self.block
        elif part == "attention":
            module = self._attention()
        elif part == "cross_attention":
            module = _inside(self.block, _CROSS_ATTENTION) or self._fail()
        else:
            return self._find_projection(part)
        return self._site(module[0], side, states_width(self.model, module[0]))

    def find_head(self, name: str, head: int) -> Site:
        """Return the columns of one head."""
        site, values = self.find(name), self.find("attention_value_output")
        count = self._heads()
        if name in ("key_output", "value_output"):  # fewer, where several queries share them
            count = site.width * count // (self.find("query_output") if name == "key_output" else values).width
        if not 0 <= head < count:
            raise ReftError(f"{self.component!r} has the heads 0 to {count - 1}, got {head}.", setting="head")
        size, start = site.width // count, site.columns[0] if site.columns else 0
        return replace(site, width=size, columns=(start + head * size, start + (head + 1) * size))

    def _mlp(self) -> tuple[Named, Named]:
        """What the MLP begins and what it ends with; both are the MLP itself where it is one module."""
        if (whole := _inside(self.block, _MLP)) is not None:
            return whole, whole
        return _child(self.block, _UP) or self._fail(), _child(self.block, _DOWN) or self._fail()

    def _find_mlp(self, side: Side) -> Site:
        first, last = self._mlp()
        path = first[0] if side == "input" else last[0]
        return self._site(path, side, states_width(self.model, path))

    def _find_activation(self) -> Site:
        first, last = self._mlp()
        holders = (first,) if first is last else (first, self.block)
        activation = next((found for holder in holders if (found := _child(holder, _ACTIVATION))), None)
        linears = [widths for module in (last[1], *last[1].children()) if (widths := widths_of(module))]
        if activation is None or not linears:
            self._fail()
        return self._site(activation[0], "output", linears[-1][0])

    def _find_projection(self, part: str) -> Site:
        attention = self._attention()
        projection, (values, _) = _linear(attention, _PROJECTIONS["output"]) or self._fail()
        if part == "attention_value":
            return self._site(projection, "input", values)
        if (own := _linear(attention, _PROJECTIONS[part])) is not None:
            return self._site(own[0], "output", own[1][1])
        fused, (_, total) = _linear(attention, _PROJECTIONS["fused"]) or self._fail()
        if _interleaved(fused, attention[1]):
            raise ReftError(
                f"{self.component!r} has no columns of its own in {fused!r}, where queries, keys and values "
                f"alternate from head to head. Edit all of it by its path, '{fused}.output'.",
                setting="component",
            )
        middle = (total + values) // 2  # queries are as wide as the weighted values; keys and values share the rest
        start, stop = {"query": (0, values), "key": (values, middle), "value": (middle, total)}[part]
        return self._site(fused, "output", stop - start, (start, stop))

    def _attention(self) -> Named:
        """The attention of a token to its own stack: by its name, or as what holds the queries."""
        if (found := _inside(self.block, _ATTENTION)) is not None:
            return found
        query, _ = _linear(self.block, _PROJECTIONS["query"]) or self._fail()
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

    def _site(self, path: str, side: Side, width: int, columns: tuple[int, int] | None = None) -> Site:
        return Site(path, side, width, columns, self.stack)

    def _fail(self) -> NoReturn:
        path, block = self.block
        raise ReftError(
            f"{self.component!r} was not found in layer {path.rpartition('.')[2]} of "
            f"{type(self.model).__name__}, whose parts are {', '.join(name for name, _ in block.named_children())}. "
            f"Give a module's path, such as '{path}.<part>.output'.",
            setting="component",
        )


def _parts(module: Named) -> Iterator[Named]:
    """The modules inside another, at any depth, without those that adapters have hung on them."""
    for name, child in module[1].named_children():
        if not name.startswith(PREFIX):
            yield (part := (f"{module[0]}.{name}", child))
            if widths_of(child) is None:
                yield from _parts(part)


def _inside(module: Named, names: str) -> Named | None:
    """The first module inside another, at any depth, that has one of the names."""
    return next((part for part in _parts(module) if re.fullmatch(names, _name(part[0]))), None)


def _linear(module: Named, names: str) -> tuple[str, tuple[int, int]] | None:
    """The first linear layer inside a module that has one of the names: its path and its widths."""
    for path, found in _parts(module):
        if re.fullmatch(names, _name(path)) and (widths := widths_of(found)):
            return path, widths
    return None


def _name(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _child(module: Named, names: str) -> Named | None:
    """The first module directly inside another that has one of the names."""
    for name, found in module[1].named_children():
        if re.fullmatch(names, name.lower()):
            return f"{module[0]}.{name}", found
    return None


def _interleaved(fused: str, attention: nn.Module) -> bool:
    """Whether queries, keys and values alternate from head to head rather than standing side by side."""
    name = _name(fused)
    return (
        name in ("query_key_value", "kv_b_proj")
        or not getattr(attention, "multi_query", True)  # GPT-BigCode
        or (name == "qkv_proj" and not hasattr(attention, "num_key_value_heads"))  # CodeGen
    )


def _find_path(model: nn.Module, component: str) -> Site:
    path, _, end = re.sub(r"\[(\d+)\]", r".\1", component).rpartition(".")
    side: Side = "input" if end == "input" else "output"
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not path or module is None or end not in ("input", "output"):
        raise ReftError(
            f"expected one of {', '.join(COMPONENTS)}, or a module's path with .input or .output, got "
            f"{component!r}.{did_you_mean(component, COMPONENTS)}",
            setting="component",
        )
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        part = next((name for name, _ in module.named_children()), "0")
        raise ReftError(
            f"{path!r} holds modules and is never called itself; name one of them, as in {path}.{part}.{end}.",
            setting="component",
        )
    return Site(path, side, _width_at(model, path, module, side), stack=_stack_of(model, path))


def _width_at(model: nn.Module, path: str, module: nn.Module, side: Side) -> int:
    if (widths := widths_of(module)) is not None:
        return widths[side == "output"]
    if (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None:  # a norm or embeddings
        return shape_of(weight)[-1]
    parent, _, name = path.rpartition(".")
    if re.fullmatch(_ACTIVATION, name.lower()):
        linears = [found for child in model.get_submodule(parent).children() if (found := widths_of(child))]
        if linears:
            return linears[-1][0]
    try:
        return states_width(model, path)
    except ReftError:
        if (width := _width_by_linears(model, path, module, side)) is None:
            raise
        return width


def _width_by_linears(model: nn.Module, path: str, module: nn.Module, side: Side) -> int | None:
    """The width at a module, by the linear layers inside it or, where there are none, by those beside it."""
    if inside := [widths for _, part in _parts((path, module)) if (widths := widths_of(part))]:
        return inside[0][0] if side == "input" else inside[-1][1]
    if any(True for _ in module.parameters()):
        return None
    beside = list(model.get_submodule(path.rpartition(".")[0]).children())  # an activation, say, or dropout
    at = next(number for number, child in enumerate(beside) if child is module)
    if before := [widths for child in beside[:at] if (widths := widths_of(child))]:
        return before[-1][1]
    after = [widths for child in beside[at:] if (widths := widths_of(child))]
    return after[0][0] if after else None


def _stack_of(model: nn.Module, path: str) -> Stack:
    """The stack whose tokens pass a module."""
    if not has_stacks(model):
        return ""
    encoder = path_of(model, stack_module(model, "encoder"))
    return "encoder" if f"{path}.".startswith(f"{encoder}.") else "decoder"
