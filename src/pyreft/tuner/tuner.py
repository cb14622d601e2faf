"""The PEFT tuner: hangs interventions on a model's modules.

A module to edit stays in place and gets a child, `reft_output` or `reft_input`, a `ReftLayer`. Which tokens are edited,
the `Locator` of the model says.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import Intervention, intervention_class
from ..places.components import Site, find_site, hidden_width, number_of_layers, stack_module
from .config import ReftConfig, Representation, shape_differences
from .layer import ReftLayer, refuse_merge
from .locator import Locator


class ReftTuner(BaseTuner):
    """Adds representation edits to a model, in the manner of every PEFT tuner.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(super().forward, args, kwargs)

    def compute(self, ordinary: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the model, `ordinary(*args, **kwargs)`, or what this thread lets compute it, see `in_part`."""
        if args or torch.compiler.is_compiling():
            return ordinary(*args, **kwargs)
        served = next((compute for tuner, compute in reversed(_in_part.served) if tuner is self), None)
        return ordinary(**kwargs) if served is None else served(ordinary, kwargs)

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
        super().delete_adapter(adapter_name)  # which takes our layers for parameters of its own and passes them over
        self.active_adapter = self._locator.forget(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            refuse_merge()
        detach(self.model)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        refuse_merge()

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


class _InPart(threading.local):
    served: tuple[tuple[ReftTuner, Any], ...] = ()  # the innermost last


_in_part = _InPart()


@contextmanager
def in_part(tuner: ReftTuner, compute: Callable[[Callable[..., Any], dict[str, Any]], Any] | None) -> Iterator[None]:
    """Let calls of a model that this thread makes be computed by something else.

    Args:
        tuner: of the model.
        compute: gets the ordinary call and its arguments, and returns what the model is to return; none to let the
            model itself do it.
    """
    entry = tuner, compute
    _in_part.served = (*_in_part.served, entry)
    try:
        yield
    finally:  # in another thread, if the one that entered has ended, there is nothing to take back
        _in_part.served = tuple(one for one in _in_part.served if one is not entry)


def reft_layers(model: nn.Module) -> list[ReftLayer]:
    """The edited places of a model."""
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def tuner_of(model: nn.Module) -> ReftTuner | None:
    """The tuner of a PEFT model with representation edits; none of any other model."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, ReftTuner) else None


def calls_tuner(model: nn.Module) -> bool:
    """Whether calls of a PEFT model pass through its tuner; a plain `PeftModel` calls its base model directly."""
    return type(model).forward is not PeftModel.forward


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
    shape = base_model_shape(model)
    if config.base_model_shape is not None and (other := shape_differences(config.base_model_shape, shape)):
        raise ReftError(f"The adapter was made for another base model: this one has {other}.")
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


def base_model_shape(model: nn.Module) -> dict[str, Any]:
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
