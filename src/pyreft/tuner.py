"""The PEFT tuner: hangs interventions on a model's modules and edits the located tokens there.

A module to edit stays in place and gets a child, `reft_output` or `reft_input`, that holds the interventions of all
adapters; a forward hook edits. Which tokens, the `Locator` of the model says.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .components import Site, find_site, hidden_width, number_of_layers
from .config import ReftConfig, Representation
from .errors import ReftError
from .interventions import Intervention, LowRankRotateLayer
from .locator import Key, Locator, Window


class ReftLayer(nn.ModuleDict, BaseTunerLayer):
    """The interventions on one side of one module, by adapter, and the hook that applies them.

    Several interventions of an adapter act one after the other in the order of its representations, several active
    adapters in the order of their activation. Parameters are called `<module>.reft_<side>.<adapter>.<number>.…`,
    the form in which PEFT and transformers insert an adapter's name when they load one.

    Args:
        module: the module whose input or output is edited.
        side: which of the two.
        locator: says which tokens.
    """

    adapter_layer_names = ("interventions",)
    other_param_names = ("indices",)

    def __init__(self, module: nn.Module, side: str, locator: Locator) -> None:
        super().__init__()
        self.indices: dict[str, list[int]] = {}  # adapter -> the numbers of these among its representations
        self.side = side
        self.locator = locator
        self._module = (module,)  # in a tuple: the module is this one's parent, not its child
        locator.layers.append(self)

    @property
    def interventions(self) -> "ReftLayer":
        """Where PEFT finds the parameters by adapter: this dict itself."""
        return self

    def add_intervention(self, adapter_name: str, index: int, intervention: Intervention) -> None:
        """Add an intervention of an adapter, the one of its representation `index`."""
        modules = cast(nn.ModuleList, self[adapter_name]) if adapter_name in self else nn.ModuleList()
        modules.append(intervention)
        self[adapter_name] = modules
        self.indices.setdefault(adapter_name, []).append(index)

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

    def _located(self, windows: dict[Key, Window]) -> Iterator[tuple[Intervention, Window]]:
        for name in self.enabled_adapters:
            for index, intervention in self.of(name):
                if (name, index) in windows:
                    yield intervention, windows[name, index]

    def rotations(self, windows: dict[Key, Window]) -> Iterator[LowRankRotateLayer]:
        """The orthonormal matrices that the next forward needs."""
        for intervention, _ in self._located(windows):
            if isinstance(rotation := getattr(intervention, "rotate_layer", None), LowRankRotateLayer):
                yield rotation

    def edit_located(self, h: Tensor) -> Tensor:
        """Return the states `[batch, tokens, d]` with the located tokens edited and every other bit as it was."""
        locator = self.locator
        if h.dim() == 2 and len(h) == locator.rows * locator.tokens:  # as in OPT's MLP
            return self.edit_located(h.view(locator.rows, locator.tokens, -1)).view_as(h)
        for intervention, window in self._located(locator.windows):
            if window is None:
                h = intervention(h.reshape(-1, h.shape[-1])).view_as(h)
                continue
            if h.shape[:2] != (locator.rows, locator.tokens):
                raise ReftError(
                    f"The states to edit have the shape {list(h.shape)}, expected [{locator.rows}, {locator.tokens}, "
                    f"{intervention.embed_dim}]; this component cannot be edited by token."
                )
            at = (window[0].to(h.device), window[1].to(h.device))
            h = h.index_put(at, intervention(h[at]))
        return h

    def set_hooked(self, wanted: bool) -> None:
        """Put the hook on the module, or take it off: where nothing is located, nothing is called."""
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


def _refuse_merge() -> NoReturn:
    raise ReftError(
        "ReFT edits hidden states at chosen tokens, which no change of the weights can do: an adapter cannot be "
        "merged. Keep it beside the model (it costs nothing while tokens are generated), or use unload()."
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
            representations, self._places = _plan(model, config)
        except ReftError:
            del self.peft_config[adapter_name]
            raise
        self._locator = locator_of(model) or Locator(model)
        self._locator.rules[adapter_name] = [entry.rule() for entry in representations]
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
                target.add_module(name, ReftLayer(target, site.side, self._locator))
            getattr(target, name).add_intervention(adapter_name, index, intervention.to(_device(target)))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if (locator := locator_of(self.model)) is not None:
            locator.rules.pop(adapter_name, None)

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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ReftError(
                "adapter_names: rows of one batch with different adapters are not supported yet; "
                "run them apart, with set_adapter() before each."
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        short, found = re.subn(rf"(\.{cls.prefix}(?:input|output))\.{re.escape(adapter_name)}\.", r"\1.", key)
        return short if found else super()._remove_adapter_name_from_key(key, adapter_name)


def reft_layers(model: nn.Module) -> list[ReftLayer]:
    """The edited places of a model."""
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def locator_of(model: nn.Module) -> Locator | None:
    """The locator of an adapted model, none if it has no representation edits."""
    return next((layer.locator for layer in reft_layers(model)), None)


def detach(model: nn.Module) -> None:
    """Take all representation edits off a model: every hook and every child module."""
    locator = locator_of(model)
    if locator is not None:
        locator.remove()
        for layer in locator.layers:
            delattr(layer._module[0], f"{ReftTuner.prefix}{layer.side}")
        model.__dict__.pop("peft_config", None)


def _plan(
    model: nn.Module, config: ReftConfig
) -> tuple[list[Representation], dict[str, list[tuple[Site, int, Intervention]]]]:
    """Check a config against a model and make its interventions; nothing is changed if anything does not fit."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ReftError("Encoder-decoder models are not supported yet.")
    shape = _shape(model)
    if config.base_model_shape not in (None, shape):
        raise ReftError(f"The adapter was made for a base model of {config.base_model_shape}, this one is {shape}.")
    representations = config.expand(number_of_layers(model) if config.representations is None else 0)
    sites = [find_site(model, entry.component, entry.layer) for entry in representations]
    places: dict[str, list[tuple[Site, int, Intervention]]] = {}
    for index, (entry, site) in enumerate(zip(representations, sites, strict=True)):
        places.setdefault(site.path, []).append((site, index, entry.make(site.width)))
    for entry in representations:
        entry.settle()
    config.base_model_shape = shape
    return representations, places


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
