"""The edits of one module: a child of it that holds the interventions of all adapters, and a hook that applies them.

Which tokens are edited, the module's `Stream` says; which modules, the tuner.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import Intervention, LowRankRotateLayer, stack
from .located import Key, Window
from .stream import Stream


class ReftLayer(nn.ModuleDict, BaseTunerLayer):
    """The interventions on one side of one module, by adapter, and the hook that applies them.

    Several interventions of an adapter act one after the other in the order of its representations. Several active
    adapters see the same states, and their edits are summed in the order of their activation:
    h' = h + Σ s (Φ(h) - h), each adapter with its strength s. Parameters are called
    `<module>.reft_<side>.<adapter>.<number>.…`, the form in which PEFT and transformers insert an adapter's name when
    they load one.

    Args:
        module: the module whose input or output is edited.
        side: which of the two.
        stream: says which tokens.
    """

    adapter_layer_names = ("interventions",)
    other_param_names = ("indices", "columns")

    def __init__(self, module: nn.Module, side: str, stream: Stream) -> None:
        super().__init__()
        self.indices: dict[str, list[int]] = {}  # adapter -> the numbers of these among its representations
        self.columns: dict[str, list[tuple[int, int] | None]] = {}  # and the part of the width that each edits
        self.side = side
        self.stream = stream
        self._module = (module,)  # in a tuple: the module is this one's parent, not its child
        stream.layers.append(self)
        self.set_hooked(stream.hooked)

    @property
    def interventions(self) -> "ReftLayer":
        """Where PEFT finds the parameters by adapter: this dict itself."""
        return self

    def get_base_layer(self) -> nn.Module:
        """The module whose input or output is edited."""
        return self._module[0]

    @property
    def weight(self) -> NoReturn:
        """None of its own, and not that of the module, which is not replaced; so `hasattr` says no."""
        raise AttributeError("A ReftLayer has no weight; its module has: get_base_layer().weight.")

    @property
    def bias(self) -> NoReturn:
        raise AttributeError("A ReftLayer has no bias; its module has: get_base_layer().bias.")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its module, in its own type; PEFT asks for it after loading with `low_cpu_mem_usage`."""
        if adapter_name in self and not any(parameter.is_meta for parameter in self[adapter_name].parameters()):
            self[adapter_name].to(device or device_of(self._module[0]))

    def add_intervention(
        self, adapter_name: str, index: int, intervention: Intervention, columns: tuple[int, int] | None = None
    ) -> None:
        """Add an intervention of an adapter, the one of its representation `index`."""
        modules = cast(nn.ModuleList, self[adapter_name]) if adapter_name in self else nn.ModuleList()
        modules.append(intervention)
        self[adapter_name] = modules
        self.indices.setdefault(adapter_name, []).append(index)
        self.columns.setdefault(adapter_name, []).append(columns)

    @property
    def enabled_adapters(self) -> list[str]:
        """The active adapters that edit here, none while adapters are disabled."""
        active = cast(list[str], self.active_adapters)
        return [] if self.disable_adapters else [name for name in active if name in self]

    def of(self, adapter_name: str) -> Iterator[tuple[int, Intervention]]:
        """The interventions of an adapter here, each with the number of its representation."""
        if adapter_name in self:
            modules = cast(Iterable[Intervention], self[adapter_name])
            yield from zip(self.indices[adapter_name], modules, strict=True)

    def has(self, key: Key) -> bool:
        """Whether the intervention of this representation is here."""
        return key[1] in self.indices.get(key[0], ())

    def rank(self, key: Key) -> int | None:
        """The rank of the intervention of a representation, if it has one."""
        return next(getattr(module, "low_rank_dimension", None) for index, module in self.of(key[0]) if index == key[1])

    def rotations(self, windows: dict[Key, Window]) -> Iterator[LowRankRotateLayer]:
        """The orthonormal matrices that the next forward needs."""
        located, rows = self.stream.located, self.stream.rows
        for name in dict.fromkeys(name for name, _ in windows):
            adapters = located.adapters(name, rows) if located is not None else []
            for adapter in dict.fromkeys(adapters or [name]):
                for index, intervention in self.of(adapter):
                    rotation = getattr(intervention, "rotate_layer", None)
                    if (name, index) in windows and isinstance(rotation, LowRankRotateLayer):
                        yield rotation

    def edit_located(self, h: Tensor) -> Tensor:
        """Return the states `[batch, tokens, d]` with the located tokens edited and every other bit as it was."""
        stream = self.stream
        windows = stream.windows(h)
        located = stream.located
        by_row = located is not None and bool(located.groups)
        here = self.keys() if by_row else self.enabled_adapters
        names = [name for name in dict.fromkeys(name for name, _ in windows) if name in here]
        if not names:
            return h
        shape = h.shape
        if h.dim() == 2 and len(h) == stream.rows * stream.tokens:  # some modules see all tokens in one row
            h = h.view(stream.rows, stream.tokens, -1)
        if h.shape[:2] != (stream.rows, stream.tokens):
            raise ReftError(
                f"The states to edit have the shape {list(shape)}, expected [{stream.rows}, {stream.tokens}, width]; "
                "this component cannot be edited by token."
            )
        if len(names) == 1 or by_row:
            for name in names:
                adapters = located.adapters(name, stream.rows) if located is not None else []
                h = self._edit_rows(h, name, windows, adapters) if adapters else self._edit(h, name, windows)
        else:
            wide = h.float()
            edits = [self._edit(wide, name, windows) - wide for name in names]
            h = functools.reduce(torch.add, edits, wide).to(h.dtype)
        return h.view(shape)

    def _edit(self, h: Tensor, name: str, windows: dict[Key, Window]) -> Tensor:
        """Apply the interventions of one adapter, one after the other."""
        stream = self.stream
        strength = stream.locator.strength(name)
        subspaces = {} if stream.located is None else stream.located.subspaces
        for (index, intervention), columns in zip(self.of(name), self.columns[name], strict=True):
            key = name, index
            if key not in windows:
                continue
            _check_device(intervention, name, h)
            at = windows[key]
            if isinstance(at, Tensor):
                h = self._edit_all(h, at, intervention, columns, strength, subspaces.get(key))
                continue
            if at is None and not (intervention.by_row or subspaces):
                flat = h.reshape(-1, h.shape[-1])
                h = _edit_columns(intervention, flat, columns, strength).view_as(h)
                continue
            if at is None:
                at = torch.ones(h.shape[:2], device=h.device).nonzero().unbind(1)  # type: ignore[assignment]
            rows, tokens = (indices.to(h.device) for indices in cast(Iterable[Tensor], at))
            context = {"rows": rows} if intervention.by_row else {}
            if key in subspaces:
                of_row = subspaces[key].to(h.device)
                context["subspaces"] = of_row[rows // (stream.rows // len(of_row))]
            edited = _edit_columns(intervention, h[rows, tokens], columns, strength, **context)
            h = h.index_put((rows, tokens), edited)
        return h

    def _edit_rows(self, h: Tensor, group: str, windows: dict[Key, Window], adapters: list[str]) -> Tensor:
        """Apply to each row of a group its own adapter's interventions, those of one representation all at once."""
        stream = self.stream
        subspaces = {} if stream.located is None else stream.located.subspaces
        strengths = [stream.locator.strength(name) for name in adapters]
        strength: float | Tensor = strengths[0]
        if len(set(strengths)) > 1:
            strength = torch.tensor(strengths, device=h.device).view(-1, 1, 1)
        for number, (index, columns) in enumerate(zip(self.indices[group], self.columns[group], strict=True)):
            if (group, index) not in windows:
                continue
            intervention = self._stacked(group, number, adapters, h)
            at, context = windows[group, index], {}
            if (of_row := subspaces.get((group, index))) is not None:
                of_row = of_row.to(h.device).repeat_interleave(stream.rows // len(of_row), dim=0)
                context["subspaces"] = (of_row if at is None else of_row[at[0].squeeze(-1)]).unsqueeze(1)
            if at is None:
                h = _edit_columns(intervention, h, columns, strength, **context)
                continue
            rows, tokens, valid = (part if part is None else part.to(h.device) for part in at)
            there = h[rows, tokens]
            edited = _edit_columns(intervention, there, columns, strength, **context)
            h = h.index_put((rows, tokens), edited if valid is None else torch.where(valid, edited, there))
        return h

    def _stacked(self, group: str, number: int, adapters: list[str], h: Tensor) -> Intervention:
        """The interventions of these adapters as one, kept until the call ends unless gradients flow through it."""
        key = self, group, number, len(adapters)
        stacks = self.stream.stacks
        if (known := stacks.get(key)) is not None:
            return known
        interventions = [cast(Any, self[name])[number] for name in adapters]
        for name, intervention in zip(adapters, interventions, strict=True):
            _check_device(intervention, name, h)
        made = stack(interventions)
        if not torch.is_grad_enabled():
            stacks[key] = made
        return made

    @staticmethod
    def _edit_all(
        h: Tensor,
        mask: Tensor,
        intervention: Intervention,
        columns: tuple[int, int] | None,
        strength: float,
        subspaces: Tensor | None,
    ) -> Tensor:
        """Edit every token and keep the edits of those in the mask: in a compiled forward, whose shapes are fixed."""
        batch, tokens, width = h.shape
        context = {}
        if intervention.by_row:
            context["rows"] = torch.arange(batch, device=h.device).repeat_interleave(tokens)
        if subspaces is not None:
            context["subspaces"] = subspaces.to(h.device).repeat_interleave(h.shape[0] * tokens // len(subspaces), 0)
        edited = _edit_columns(intervention, h.reshape(-1, width), columns, strength, **context).view_as(h)
        return torch.where(mask.to(h.device)[..., None], edited, h)

    def set_hooked(self, wanted: bool) -> None:
        """Put the hook on the module, or take it off: where nothing is located, nothing is called.

        It is there while no forward runs, since a forward that is compiled finds its hooks and puts none.
        """
        module = self._module[0]
        hooks = module._forward_pre_hooks if self.side == "input" else module._forward_hooks
        for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
        if wanted and self.side == "input":
            module.register_forward_pre_hook(self._edit_input, with_kwargs=True)
        elif wanted:  # first of all hooks: those that record hidden states see the edited ones
            module.register_forward_hook(self._edit_output, prepend=True)

    def _edit_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.edit_located(output)
        return type(output)((self.edit_located(output[0]), *output[1:]))

    def _edit_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.edit_located(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.edit_located(kwargs["hidden_states"])}

    def forward(self, h: Any) -> Any:
        """Nothing: the hook edits. An `nn.Sequential` that is edited runs this one after its own parts."""
        return h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        refuse_merge()

    def unmerge(self) -> NoReturn:
        refuse_merge()


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of a module are; the CPU for those that are offloaded until they are needed."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    offloaded = device.type == "meta" and any(hasattr(part, "_hf_hook") for part in module.modules())
    return torch.device("cpu") if offloaded else device


def type_of(module: nn.Module) -> torch.dtype | None:
    """The type of a module's parameters, but for quantized ones; none if all are."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _check_device(intervention: Intervention, adapter_name: str, h: Tensor) -> None:
    if (device := next(intervention.parameters()).device) != h.device:
        raise ReftError(
            f"The edits of adapter {adapter_name!r} are on {device}, the states on {h.device}; move them together, as "
            "with model.to(device) or reft_model.set_device(device)."
        )


def _edit_columns(
    intervention: Intervention, h: Tensor, columns: tuple[int, int] | None, strength: float | Tensor, **context: Tensor
) -> Tensor:
    """Edit a part of the width of the states `[..., d]`, with h + s (Φ(h) - h) for another strength than 1."""
    part = h if columns is None else h[..., columns[0] : columns[1]]
    if not isinstance(strength, Tensor) and strength == 1:
        edited = intervention(part, **context)
    else:
        wide = part.float()
        edited = (wide + strength * (intervention(wide, **context) - wide)).to(h.dtype)
    return edited if columns is None else torch.cat((h[..., : columns[0]], edited, h[..., columns[1] :]), dim=-1)


def refuse_merge() -> NoReturn:
    """Say why an adapter cannot be merged into the weights."""
    raise ReftError(
        "ReFT edits hidden states at chosen tokens, and weights act on all of them: an adapter cannot be merged. Keep "
        "it beside the model (one of the prompt alone costs nothing while tokens are generated), or use unload()."
    )
