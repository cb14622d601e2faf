"""The edits of one module: a child of it that holds the interventions of all adapters, and a hook that applies them.

Which tokens are edited, the `Call` that runs says; which modules, the tuner.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import Intervention, OrthonormalColumns, stack
from ..interventions.pyvene import Asked, speaks_pyvene
from ..places.lookup import Columns
from ..places.structure import PREFIX
from .call import Call, Reading, innermost, running
from .located import Key, Tokens
from .resolve import read_states


class ReftLayer(nn.ModuleDict, BaseTunerLayer):
    """The interventions on one side of one module, by adapter, and the edit of its states.

    Several interventions of an adapter act one after the other in the order of its representations. Several active
    adapters see the same states, and their edits are summed in the order of their activation:
    h' = h + Σ s (Φ(h) - h), each adapter with its strength s. Parameters are called
    `<module>.reft_<side>.<adapter>.<number>.…`, the form in which PEFT and transformers insert an adapter's name when
    they load one.

    Args:
        module: the module whose input or output is edited.
        side: which of the two.
        edits: of the model.
        stack: whose tokens pass the module, see `places.components.Site`.
        number: of this layer among those of the model.
    """

    adapter_layer_names = ("interventions",)
    other_param_names = ("indices", "columns")
    cast_input_dtype_enabled = True  # PEFT's helper switches it off in all layers; states get no parameter's type here

    def __init__(self, module: nn.Module, side: str, edits: Any, stack: str, number: int) -> None:
        super().__init__()
        self.indices: dict[str, list[int]] = {}  # adapter -> the numbers of these among its representations
        self.columns: dict[str, list[Columns | None]] = {}  # and the part of the width that each edits
        self.side, self.edits, self.stack, self.number = side, edits, stack, number
        self._module = (module,)  # in a tuple: the module is this one's parent, not its child

    def attach(self) -> None:
        """Become a child of the module, with the hook."""
        module = self._module[0]
        # another thread may go through the dict; a compiled module would set an attribute in the one that it wraps
        vars(module)["_modules"] = {**module._modules, f"{PREFIX}{self.side}": self}
        if self.side == "input":
            module.register_forward_pre_hook(edit_input, with_kwargs=True)
        else:  # first of all hooks: those that record hidden states see the edited ones
            module.register_forward_hook(edit_output, prepend=True)

    def detach(self) -> None:
        """Take the hook and this child off the module, as far as it has them."""
        module = self._module[0]
        hooks: dict = module._forward_pre_hooks if self.side == "input" else module._forward_hooks
        for number in [n for n, hook in hooks.items() if hook in (edit_input, edit_output)]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
        vars(module)["_modules"] = {name: child for name, child in module._modules.items() if child is not self}

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
        self, adapter_name: str, index: int, intervention: Intervention, columns: Columns | None = None
    ) -> None:
        """Add an intervention of an adapter, the one of its representation `index`."""
        modules = cast(nn.ModuleList, self[adapter_name]) if adapter_name in self else nn.ModuleList()
        modules.append(intervention)
        intervention.__dict__["_speaks_pyvene"] = speaks_pyvene(intervention)  # for a forward that is compiled
        kept = [name for name, parameter in intervention.named_parameters() if not parameter.requires_grad]
        intervention.__dict__.setdefault("_frozen", kept)  # unless it was in a layer, where PEFT may have frozen it
        # also under a name that this class has for something else
        self._modules = {**self._modules, adapter_name: modules}
        self.indices.setdefault(adapter_name, []).append(index)
        self.columns.setdefault(adapter_name, []).append(columns)

    def __delitem__(self, adapter_name: str) -> None:
        if adapter_name not in self._modules:
            raise KeyError(adapter_name)
        self._modules = {name: modules for name, modules in self._modules.items() if name != adapter_name}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As of every PEFT layer; parameters that an intervention was made with frozen stay so."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As `set_adapter` does, for adapters that need not be active."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for intervention in (one for modules in self.values() for one in cast(Iterable[Any], modules)):
            for name in vars(intervention).get("_frozen", ()):
                intervention.get_parameter(name).requires_grad_(False)

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

    def rank(self, key: Key) -> int | None:
        """The rank of the intervention of a representation, if it has one."""
        return next(getattr(module, "low_rank_dimension", None) for index, module in self.of(key[0]) if index == key[1])

    def speaks_pyvene(self, key: Key) -> bool:
        """Whether the intervention of a representation takes what a call gives it as it stands."""
        return any(speaks_pyvene(module) for index, module in self.of(key[0]) if index == key[1])

    def rotations(self, reading: Reading) -> Iterator[OrthonormalColumns]:
        """The orthonormal matrices that edits in a forward need."""
        for name in dict.fromkeys(name for name, _ in reading.at):
            for adapter in dict.fromkeys(reading.adapters[name] or [name]):
                for index, intervention in self.of(adapter):
                    if (name, index) in reading.at and (R := _rotation(intervention)) is not None:
                        yield R

    def edit(self, h: Tensor, call: Call, reading: Reading, x: Tensor | None = None) -> Tensor:
        """Return the states `[batch, tokens, d]` with the located tokens edited and every other bit as it was.

        Args:
            h: the states.
            call: that runs.
            reading: of the forward.
            x: what the module read, `[batch, tokens, k]`, for interventions that read it, too.
        """
        here = self if call.row_adapters is not None else call.enabled_at(self.number)
        names = [name for name in dict.fromkeys(name for name, _ in reading.at) if name in here]
        if not names:
            return h
        call.reached.add(self.number)
        shape, dtype = h.shape, h.dtype
        if h.dim() == 2 and len(h) == reading.rows * reading.tokens:  # some modules see all tokens in one row
            h = h.view(reading.rows, reading.tokens, -1)
            x = x.reshape(reading.rows, reading.tokens, -1) if isinstance(x, Tensor) and x.dim() == 2 else x
        if h.shape[:2] != (reading.rows, reading.tokens):
            raise ReftError(
                f"The states to edit have the shape {list(shape)}, expected [{reading.rows}, {reading.tokens}, width]; "
                "this component cannot be edited by token."
            )
        if len(names) == 1 or call.row_adapters is not None:  # no two edit the same row
            for name in names:
                h = self._edited(h, x, name, call, reading)
            return h.view(shape)
        wide = total = h.float()
        for name in names:
            total = total + (self._edited(wide, x, name, call, reading) - wide)
        return total.to(dtype).view(shape)

    def _edited(self, h: Tensor, x: Tensor | None, name: str, call: Call, reading: Reading) -> Tensor:
        """Apply the interventions of an adapter, or those of the adapters of a group of rows, one after the other."""
        if name not in self:
            call.edits.check_running(call)
        adapters = reading.adapters[name]
        strength: float | Tensor = reading.strengths[name][0]
        if len(set(reading.strengths[name])) > 1:
            strengths = torch.tensor(reading.strengths[name], dtype=torch.float32, device=h.device)
            strength = strengths.view(-1, 1, 1)
        for number, (index, columns) in enumerate(zip(self.indices[name], self.columns[name], strict=True)):
            if (name, index) not in reading.at:
                continue
            intervention, R = self._intervention(name, number, adapters, call, h)
            at = reading.at[name, index].to(h.device)
            at = at.alone() if intervention.by_row else at  # such a formula takes no other tokens
            context = _context(intervention, R, (name, index), at, reading, by_itself=not adapters)
            if getattr(intervention, "reads_input", False):
                read = at.of(self._check_input(x, h))
                context["x"] = read if adapters else read.flatten(0, 1)
            there = at.of(h)  # [n, k, d], or [n, k, heads, d]
            part = there if columns is None else columns.take(there)
            states = part.flatten(1, -2) if adapters else part.flatten(0, 1)
            new = _formula(intervention, states, strength, context).to(h.dtype).view_as(part)
            if at.valid is not None:
                new = torch.where(at.valid[(..., *[None] * (part.dim() - 2))], new, part)
            h = at.put(h, new if columns is None else columns.put(there, new))
        return h

    def _check_input(self, x: Tensor | None, h: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == h.shape[:2]:
            return x
        raise ReftError(
            f"The input of the edited {type(self._module[0]).__name__} is to be read, and was not given to it by token "
            "as its first argument."
        )

    def _intervention(
        self, name: str, number: int, adapters: list[str], call: Call, h: Tensor
    ) -> tuple[Intervention, Tensor | None]:
        """An adapter's intervention, or those of the adapters of rows as one; and R, where the call has computed it."""
        if adapters:
            return self._stacked(name, number, adapters, call, h)
        intervention = cast(Any, self[name])[number]
        _check_device(intervention, name, h)
        if _asked_as_in_pyvene(intervention):
            return cast(Any, Asked(intervention)), None
        return intervention, call.rotations.get(cast(Any, _rotation(intervention)))

    def _stacked(
        self, name: str, number: int, adapters: list[str], call: Call, h: Tensor
    ) -> tuple[Intervention, Tensor | None]:
        """The interventions of the adapters of rows as one; and their R."""
        key = self.number, name, number, len(adapters)
        if (known := call.stacked.get(key)) is not None:
            return known
        interventions = [cast(Any, self[adapter])[number] for adapter in adapters]
        for adapter, intervention in zip(adapters, interventions, strict=True):
            _check_device(intervention, adapter, h)
        R = None
        if hasattr(interventions[0], "rotate_layer"):
            R = torch.stack([_its_R(intervention.rotate_layer, call) for intervention in interventions])
        made = stack(interventions), R
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call.stacked[key] = made  # for the steps of a generation
        return made

    def forward(self, h: Any) -> Any:
        """Nothing: the hook edits. An `nn.Sequential` that is edited runs this one after its own parts."""
        return h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        refuse_merge()

    def unmerge(self) -> NoReturn:
        refuse_merge()


def _its_R(layer: OrthonormalColumns, call: Call) -> Tensor:
    known = call.rotations.get(layer)
    return layer.weight.mT if known is None else known


def _asked_as_in_pyvene(intervention: Any) -> bool:
    """See `speaks_pyvene`, which most need not be asked for; a compiled forward knows it from when it was added."""
    if torch.compiler.is_compiling():
        return intervention._speaks_pyvene
    ours = type(intervention).forward is Intervention.forward and "forward" not in intervention.__dict__
    return not ours and speaks_pyvene(intervention)


def _rotation(intervention: nn.Module) -> OrthonormalColumns | None:
    """The R of an intervention of ours, which may be computed for it; one that is asked as in pyvene does it itself."""
    layer = getattr(intervention, "rotate_layer", None)
    return layer if isinstance(layer, OrthonormalColumns) else None


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of a module are; the CPU for those that are offloaded until they are needed."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    offloaded = device.type == "meta" and any(hasattr(part, "_hf_hook") for part in module.modules())
    return torch.device("cpu") if offloaded else device


def type_of(module: nn.Module) -> torch.dtype | None:
    """The type of a module's parameters, but for quantized ones; none if all are."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


_NOTHING: Any = object()


def edit_output(module: Any, args: tuple, output: Any) -> Any:
    """The hook behind an edited module."""
    layer = module._modules["reft_output"]  # of this very module: a replica of it has its own
    if (found := _reading(layer)) is None:
        return None
    if isinstance(output, Tensor):
        return layer.edit(output, *_from_states(layer, found, output), args[0] if args else None)
    return type(output)((layer.edit(output[0], *_from_states(layer, found, output[0])), *output[1:]))


def edit_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The hook before an edited module."""
    layer = module._modules["reft_input"]
    if (found := _reading(layer)) is None:
        return None
    h = args[0] if args else kwargs["hidden_states"]
    edited = layer.edit(h, *_from_states(layer, found, h))
    return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})


def _reading(layer: ReftLayer) -> tuple[Call, Reading | None] | None:
    """The call that runs, and what the forward reads; none if there is nothing to edit."""
    frames = running.frames  # mostly the last that began is the one, and each layer asks in each step
    call = frames[-1] if frames and frames[-1].edits is layer.edits else innermost(layer.edits)
    if isinstance(call, Call):
        if not call.readings:  # a decoding step
            return None
        reading = call.readings.get(layer.stack, _NOTHING)
        return None if reading is _NOTHING or (reading is not None and not reading.at) else (call, reading)
    if call is None and layer.enabled_adapters:
        raise ReftError(
            "An edited module was called outside of a call of its model, so which tokens to edit is not known. Call "
            "the model; to compute blocks once more in the backward, use model.gradient_checkpointing_enable()."
        )
    return None


def _from_states(layer: ReftLayer, found: tuple[Call, Reading | None], h: Tensor) -> tuple[Call, Reading]:
    """The same; where pictures or sound came in, only the states say how many tokens they are."""
    call, reading = found
    return call, read_states(call, layer.stack, h) if reading is None else reading


def _context(
    intervention: Intervention, R: Tensor | None, key: Key, at: Tokens, reading: Reading, by_itself: bool
) -> dict[str, Any]:
    """What an intervention gets beside the states.

    Args:
        by_itself: whether each token stands by itself, `[n, d]`, or those of a row together, `[rows, k, d]`.
    """
    context: dict[str, Any] = {} if R is None else {"R": R}
    of_row = reading.located.subspaces.get(key)
    if of_row is None and not intervention.by_row:
        return context
    rows, k = at.rows, 1
    if rows is None:
        rows, k = torch.arange(reading.rows, device=reading.located.masks[key].device), reading.tokens
    examples = None if at.places is None and at.valid is None else reading.located.examples  # none behind the mask
    if intervention.by_row and of_row is None and examples is not None:
        context["rows"] = at.of(examples.to(rows.device)[..., None]).flatten()  # of packed rows, each by itself
    elif intervention.by_row:
        context["rows"] = rows[:, None].expand(-1, k).flatten()
    if isinstance(of_row, list):
        times = reading.rows // len(of_row)
        context["subspaces"] = [entry for entry in of_row for _ in range(times)]
    elif isinstance(of_row, dict):
        context["subspaces"] = of_row
    elif of_row is not None:  # [n, 1, r]
        directions = of_row.to(rows.device)[rows[:, None] // (reading.rows // len(of_row))]
        context["subspaces"] = directions.expand(-1, k, -1).flatten(0, 1) if by_itself else directions[:, 0]
    return context


def _formula(intervention: Intervention, h: Tensor, strength: float | Tensor, context: dict[str, Any]) -> Tensor:
    """h + s (Φ(h) - h), where s is another strength than 1."""
    if not isinstance(strength, Tensor) and strength == 1:
        return intervention(h, **context)
    wide = h.float()
    return (wide + strength * (intervention(wide, **context) - wide)).to(h.dtype)


def _check_device(intervention: Intervention, adapter_name: str, h: Tensor) -> None:
    if any("_fsdp_wrapped_module" in part._modules for part in intervention.children()):
        raise ReftError(
            "FSDP has wrapped parts of an edit by themselves, as the policy for PEFT models does that the Trainer of "
            "transformers sets for version 1, and the edit needs all of them at once. Use version 2, or wrap whole "
            "blocks: transformer_auto_wrap_policy with use_orig_params=True."
        )
    parameter = next(intervention.parameters(), None)
    if parameter is not None and parameter.device != h.device:
        raise ReftError(
            f"The edits of adapter {adapter_name!r} are on {parameter.device}, the states on {h.device}; move them "
            "together, as with model.to(device) or reft_model.set_device(device)."
        )


def refuse_merge() -> NoReturn:
    """Say why an adapter cannot be merged into the weights."""
    raise ReftError(
        "ReFT edits hidden states at chosen tokens, and weights act on all of them: an adapter cannot be merged. Keep "
        "it beside the model (one of the prompt alone costs nothing while tokens are generated), or use unload()."
    )
