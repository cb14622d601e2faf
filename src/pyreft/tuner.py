"""The PEFT tuner: hangs interventions on a model's modules and edits the located tokens there.

A module to edit stays in place and gets a child, `reft_output` or `reft_input`, that holds the interventions of all
adapters; a forward hook edits. Which tokens, the `Locator` of the model says.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .components import Site, find_site, hidden_width, number_of_layers, stack_module
from .config import ReftConfig, Representation
from .errors import ReftError
from .interventions import Intervention, LowRankRotateLayer, intervention_class, stack
from .located import Key, Window
from .locator import Locator, Stream


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

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("A ReftLayer edits through the hook on its module.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        _refuse_merge()

    def unmerge(self) -> NoReturn:
        _refuse_merge()


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


def _refuse_merge() -> NoReturn:
    raise ReftError(
        "ReFT edits hidden states at chosen tokens, and weights act on all of them: an adapter cannot be merged. Keep "
        "it beside the model (one of the prompt alone costs nothing while tokens are generated), or use unload()."
    )


class ReftTuner(BaseTuner):
    """Adds representation edits to a model, in the manner of every PEFT tuner.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        try:
            representations, sites, self._places = _plan(model, config)
        except ReftError:
            del self.peft_config[adapter_name]
            raise
        self._locator = locator_of(model) or Locator(model, _stacks(model))
        self._locator.rules[adapter_name] = [entry.rule() for entry in representations]
        self._locator.places[adapter_name] = [site.stack for site in sites]
        stackable = all(intervention_class(entry.intervention).stackable for entry in representations)
        self._locator.kinds[adapter_name] = representations if stackable else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool:
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for site, index, intervention in self._places[current_key]:
            name = f"{self.prefix}{site.side}"
            if not hasattr(target, name):
                target.add_module(name, ReftLayer(target, site.side, self._locator.streams[site.stack]))
            layer = getattr(target, name)
            layer.add_intervention(adapter_name, index, intervention.to(_device(target)), site.columns)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first that is left becomes active."""
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)  # which takes our layers for parameters of its own and leaves them
        for layer in reft_layers(self.model):
            if adapter_name in layer:
                del layer[adapter_name], layer.indices[adapter_name], layer.columns[adapter_name]
        left = [name for name in active if name != adapter_name] or list(self.peft_config)[:1]
        if adapter_name in active:
            self.set_adapter(left)
        self.active_adapter = left
        if (locator := locator_of(self.model)) is not None:
            for known in (locator.rules, locator.places, locator.kinds, locator.strengths):
                known.pop(adapter_name, None)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            _refuse_merge()
        detach(self.model)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        _refuse_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ReftError(
            "add_weighted_adapter: a weighted sum of edits is in general no edit of the same formula, so it makes no "
            "new adapter. Switch the adapters on together, model.base_model.set_adapter(['a', 'b']), and weight each "
            "with model.set_strength('a', 0.7): their edits are summed."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        locator = self._locator
        if not names:
            raise ReftError("adapter_names: expected one name for each row, got none.")
        locator.check_names(names, "adapter_names")
        locator.row_adapters = list(names)
        try:
            yield
        finally:
            locator.row_adapters = None

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        short, found = re.subn(rf"(\.{cls.prefix}(?:input|output))\.{re.escape(adapter_name)}\.", r"\1.", key)
        return short if found else super()._remove_adapter_name_from_key(key, adapter_name)


def reft_layers(model: nn.Module) -> list[ReftLayer]:
    """The edited places of a model."""
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def penalty(model: nn.Module) -> Tensor | None:
    """What the active interventions add to the training loss after a forward, a scalar; none if nothing.

    `ReftTrainer` adds it. In a loop of one's own, add it to the loss before the backward.
    """
    layers = reft_layers(model)
    edits = (edit for layer in layers for name in layer.enabled_adapters for _, edit in layer.of(name))
    terms = [term for edit in edits if (term := edit.penalty()) is not None]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def locator_of(model: nn.Module) -> Locator | None:
    """The locator of an adapted model, none if it has no representation edits."""
    return next((layer.stream.locator for layer in reft_layers(model)), None)


def detach(model: nn.Module) -> None:
    """Take all representation edits off a model: every hook and every child module."""
    locator = locator_of(model)
    if locator is not None:
        locator.remove()
        for layer in locator.layers:
            delattr(layer._module[0], f"{ReftTuner.prefix}{layer.side}")
        model.__dict__.pop("peft_config", None)


Places = dict[str, list[tuple[Site, int, Intervention]]]


def _plan(model: nn.Module, config: ReftConfig) -> tuple[list[Representation], list[Site], Places]:
    """Check a config against a model and make its interventions; nothing is changed if anything does not fit."""
    shape = _shape(model)
    if config.base_model_shape not in (None, shape):
        raise ReftError(f"The adapter was made for a base model of {config.base_model_shape}, this one is {shape}.")
    layers = number_of_layers(model, config.component) if config.representations is None else 0
    representations = config.expand(layers)
    sites = [find_site(model, entry.component, entry.layer, entry.head) for entry in representations]
    places: Places = {}
    for index, (entry, site) in enumerate(zip(representations, sites, strict=True)):
        places.setdefault(site.path, []).append((site, index, entry.make(site.width)))
    for entry in representations:
        entry.settle()
    config.base_model_shape = shape
    return representations, sites, places


def _stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute the streams of a model with an encoder and a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    return {name: stack_module(model, name) for name in ("encoder", "decoder")}


def _shape(model: nn.Module) -> dict[str, Any]:
    """What tells base models apart that an adapter cannot be moved between."""
    return {
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "hidden_size": hidden_width(model),
        "num_hidden_layers": number_of_layers(model),
    }


def _device(module: nn.Module) -> torch.device:
    """Where the parameters of a module are; the CPU for those that are offloaded."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
