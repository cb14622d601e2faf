"""The PEFT tuner: hangs interventions on a model's modules.

A module to edit stays in place and gets a child, `reft_output` or `reft_input`, a `ReftLayer`. Which tokens are edited,
the `Call` that runs says.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.functional import cast_adapter_dtype, set_adapter
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import intervention_class, speaks_pyvene
from ..places.structure import PREFIX, path_of
from ..sharded import is_sharded
from .adapted import edits_of, reft_layers
from .call import Surroundings, within
from .changing import one_at_a_time, switching
from .config import ReftConfig, check_unchanged
from .in_part import in_part
from .injection import (
    check_free,
    check_name,
    detach,
    edits_for,
    leave_inference,
    make_interventions,
    own_config,
    take_back,
    unused,
    watch,
)
from .layer import ReftLayer, device_of, refuse_merge, type_of
from .row_heads import attend, heed
from .values import check_values

_COMPILED = "_orig_mod."  # before the paths in a model that `torch.compile` has wrapped


class ReftTuner(BaseTuner):
    """Adds representation edits to a model, in the manner of every PEFT tuner.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """

    prefix = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        wrapped = isinstance(peft_config, dict)  # by a `PeftModel`; else the model itself gets the adapter
        check_free(model, adapter_name, wrapped)
        others = getattr(model, "peft_config", None) if wrapped else None  # of a LoRA, say: two sets, kept apart
        if others is not None:
            self.peft_config: dict[str, Any] = {}
        with warnings.catch_warnings():
            if wrapped:
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if others is not None:
            self.model.peft_config = others
        self.edits.wrapped = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(super().forward, args, kwargs)

    def compute(self, ordinary: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the model, `ordinary(*args, **kwargs)`, or what computes it in this thread, see `InPart`."""
        self.check_attached()
        if args or torch.compiler.is_compiling():
            return ordinary(*args, **kwargs)
        compute = in_part.of(self) if in_part.entries else None
        return ordinary(**kwargs) if compute is None else compute(ordinary, kwargs)

    def check_attached(self) -> None:
        """Refuse to act for edits that are not on the base model any more, where another's may be now.

        Raises:
            ReftError: `unload()`, or another `ReftModel` of this base model, took them off.
        """
        if self.edits.removed:
            raise ReftError(
                "This model's edits were taken off its base model when another ReftModel was made from it, or by "
                "unload(). Load the adapter again, or add several to one model with load_adapter()."
            )

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        return peft_config

    @one_at_a_time
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if "edits" in vars(self):
            self.check_attached()
        known = edits_of(model)
        modules, others = (dict(model.named_modules()), []) if known is None else ({}, [*known.rules])
        count = 0 if known is None else len(known.layers)
        try:
            with unused(config := own_config(self.peft_config[adapter_name], model)):
                self.peft_config[adapter_name] = config
                check_name(adapter_name)
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    representations, sites, self._sites = make_interventions(model, config)
                self._check_places(state_dict)
                self.edits = known or edits_for(model)
                if known is None:
                    watch(self.edits)
                self.edits.rules[adapter_name] = [entry.rule() for entry in representations]
                self.edits.places[adapter_name] = [site.stack for site in sites]
                classes = [intervention_class(entry.intervention) for entry in representations]
                stackable = all(getattr(cls, "stackable", False) and not speaks_pyvene(cls) for cls in classes)
                self.edits.kinds[adapter_name] = representations if stackable else None
                self.edits.made[adapter_name] = config.edits()
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                leave_inference(model)
        except BaseException:  # also where it is interrupted: a half of an adapter would edit, and be added to
            heads = self.reft_heads()
            del self.peft_config[adapter_name]
            if known is None:
                take_back(model, modules, vars(self).get("edits"))
            elif adapter_name not in others:
                known.forget(adapter_name, self.peft_config, heads)
                for layer in known.layers[count:]:
                    layer.detach()
                del known.layers[count:]
            raise

    def _check_places(self, state_dict: dict[str, Tensor] | None) -> None:
        """Refuse tensors, by whose names PEFT would choose the places, that are not those of the config."""
        mark = f".{self.prefix}"
        found = {key.rsplit(mark, 1)[0].removeprefix(_COMPILED) for key in state_dict or () if mark in key}
        wanted = {path.removeprefix(_COMPILED) for path in self._sites}
        if state_dict is not None and found != wanted:
            raise ReftError(
                f"expected tensors of the places that the config edits ({', '.join(sorted(wanted))}), got those "
                f"of {', '.join(sorted(found)) or 'none'}.",
                setting="state_dict",
            )

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool:
        return key in self._sites

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
        places = self._sites.get(current_key) or self._sites[_COMPILED + current_key]  # PEFT takes it off, at times
        for site, index, intervention in places:
            name = f"{self.prefix}{site.side}"
            if not hasattr(target, name):
                layer = ReftLayer(target, site.side, self.edits, site.stack, len(self.edits.layers))
                self.edits.layers.append(layer)
                layer.attach()
            if not any(parameter.is_meta for parameter in intervention.parameters()):
                intervention.to(device_of(target))
            getattr(target, name).add_intervention(adapter_name, index, intervention, site.columns)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool | None = True) -> None:
        """Cast an adapter's parameters to float32, or without autocast to the type of what they edit.

        With none they stay as they were made: in float32, or in the type that an intervention was given.
        """
        for layer in reft_layers(self.model) if autocast_adapter_dtype is not None else ():
            if autocast_adapter_dtype:
                cast_adapter_dtype(layer, adapter_name)
            elif adapter_name in layer and (dtype := type_of(layer.get_base_layer())) is not None:
                layer[adapter_name].to(dtype)

    def reft_heads(self) -> list[AuxiliaryTrainingWrapper]:
        """What adapters train beside their edits, but for that of a LoRA beneath."""
        configs = self.peft_config.values()
        names = tuple(name for config in configs for name in getattr(config, "modules_to_save", None) or ())
        found = self.model.named_modules() if names else ()
        return [m for path, m in found if isinstance(m, AuxiliaryTrainingWrapper) and path.endswith(names)]

    @one_at_a_time
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several.

        Raises:
            ReftError: no such adapter, with which the base model would answer.
        """
        self.check_attached()
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.edits.check_names(names, "adapter_name", base=False)
        with switching:
            for module in (*self.reft_heads(), *reft_layers(self.model)):  # heads refuse several at once
                set_adapter(module, adapter_name, inference_mode, ReftLayer)
            self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with switching:
            for module in (*self.reft_heads(), *reft_layers(self.model)):
                module.enable_adapters(enabled)
        heed(self.edits, self.reft_heads())  # also within `disable_adapter`, where the edits stay off

    @one_at_a_time
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, another becomes active, with its trained head.

        Raises:
            ValueError: no such adapter.
        """
        self.check_attached()
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        heads = self.reft_heads()
        del self.peft_config[adapter_name]
        self.active_adapter = self.edits.forget(adapter_name, self.peft_config, heads)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            refuse_merge()
        self.check_attached()
        for head in self.reft_heads():
            path = path_of(self.model, head)
            plain = head.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            self.model.set_submodule(path, plain)
        detach(self.model)
        return self.model

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
        self.check_attached()
        names, around = kwargs.get("adapter_names"), []
        if names is not None:
            if isinstance(names, str):
                raise ReftError(f"expected a list with one name for each row, got {names!r}.", setting="adapter_names")
            if not names:
                raise ReftError("expected one name for each row, got none.", setting="adapter_names")
            self.edits.check_names(names, "adapter_names")
            attend(self.edits, self.reft_heads())
            around.append(Surroundings(self.edits, row_adapters=list(names)))
        with within(*around):  # in any case: a call that is interrupted leaves nothing running
            yield

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if (tuner := tuner_of(model)) is not None:
            tuner.check_attached()
        found = super()._get_adapter_state_dict(model, *args, **kwargs)
        name, others = kwargs["adapter_name"], kwargs["unwanted_adapter_names"]
        if tuner is not None and name in tuner.edits.made:
            check_unchanged(name, tuner.edits.made[name], tuner.peft_config[name].edits())
        own = re.compile(rf"\.{cls.prefix}(input|output)\.{re.escape(name)}\.")
        found = {key: value for key, value in found.items() if own.search(key)}  # not that of a LoRA beneath
        # PEFT takes some for those of another adapter whose name is a part of their path, as "1" is of layer 1's
        paths = {path for path, _ in (*model.named_parameters(), *model.named_buffers()) if own.search(path)}
        lost = {path for path in paths - found.keys() if not set(others).isdisjoint(path.split("."))}
        if not lost:
            return found
        sharded = any(map(is_sharded, model.parameters()))
        whole = {} if sharded else model.state_dict()
        if sharded or any(
            key not in whole or value.data_ptr() != whole[key].data_ptr() for key, value in found.items()
        ):
            raise ReftError(
                f"PEFT leaves out {len(lost)} tensors of {name!r}, such as {min(lost)}, since a part of their paths is "
                f"called as another adapter ({', '.join(others)}). Give that one another name."
            )
        return found | {path: whole[path] for path in lost & whole.keys()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        short, found = re.subn(rf"(\.{cls.prefix}(?:input|output))\.{re.escape(adapter_name)}\.", r"\1.", key)
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return short.replace(f".{_COMPILED}", ".")  # so that a file fits the model whether it is compiled or not

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if (tuner := tuner_of(model)) is not None:
            tuner.check_attached()
        mark = re.compile(rf"\.{cls.prefix}(input|output)\.{re.escape(adapter_name)}\.")
        own = {
            cls._remove_adapter_name_from_key(key, adapter_name): tensor
            for key, tensor in model.state_dict().items()
            if mark.search(key)
        }
        _check_complete({key for key in state_dict if f".{cls.prefix}" in key}, own)
        for name, tensor in state_dict.items():  # however PEFT came by it
            of_float = name not in own or own[name].is_floating_point()  # a user's class may have other buffers
            check_values(name, tensor, floats=f".{cls.prefix}" in name and of_float)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def _check_complete(found: Collection[str], expected: Collection[str]) -> None:
    """Refuse tensors that are not those of all edits of an adapter: PEFT would leave the others as they were made.

    Raises:
        ReftError: with one that is missing, or one that is not known.
    """
    for what, names in (("missing", set(expected) - set(found)), ("not known", set(found) - set(expected))):
        if names:
            raise ReftError(
                f"expected the {len(expected)} tensors of the adapter's edits, got {len(found)}: "
                f"{min(names)} is {what}. Was the file copied completely, and is it this adapter's?",
                setting="state_dict",
            )


def tuner_of(model: nn.Module) -> ReftTuner | None:
    """The tuner of a PEFT model with representation edits; none of any other model."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, ReftTuner) else None


def calls_tuner(model: nn.Module) -> bool:
    """Whether calls of a PEFT model pass through its tuner; a plain `PeftModel` calls its base model directly."""
    return type(model).forward is not PeftModel.forward
