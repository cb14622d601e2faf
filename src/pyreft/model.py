"""`ReftModel`: a PEFT model that also answers to the calls of the original library."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import ReftError
from .files.adapter import WEIGHTS, as_it_was, check_room, model_card, read_config, remembered
from .files.original import legacy_place, read_legacy
from .files.to_peft import save_lora
from .files.together import leave_out, reading, save_together
from .files.trained_heads import add_heads, tell_of_resized
from .files.weights import checked_load
from .original.calls import FORWARD, GENERATE, answer, by_names_too, check_tokens, is_original, translate
from .original.configs import as_config
from .original.members import OriginalMembers
from .original.saving import OriginalSaving
from .places.structure import without_adapters
from .positions import Positions
from .tuner.call import Surroundings, within
from .tuner.changing import changing
from .tuner.config import ReftConfig
from .tuner.injection import detach, task_heads
from .tuner.registry import Edits, check_strength
from .tuner.row_heads import heed
from .tuner.tuner import tuner_of


def _of_base(name: str) -> property:
    """An attribute of the base model: what is set on the adapted one is meant for it, and read there alone."""
    return property(
        lambda self: getattr(self.get_base_model(), name),
        lambda self, value: setattr(self.get_base_model(), name, value),
    )


class ReftModel(OriginalMembers, OriginalSaving, PeftModel):
    """A frozen base model with representation edits.

    Called as any transformers model, it returns what that returns. Called in the manner of the original library,
    with a dict of inputs first or with `unit_locations`, it returns a pair: the base model's output (none unless
    `output_original_output=True`) and the edited one.

    Args:
        model: the base model; it is frozen, and edited in place.
        peft_config: what to edit; it may also come first, as in the original.
        adapter_name: a name for the adapter.
        autocast_adapter_dtype: the adapter's parameters in float32 (true) or in the type of the base model's (false);
            if nothing is said as they are made, which is float32 or the type that an intervention was given.
        low_cpu_mem_usage: leave the adapter's parameters without values, for those of a file to take their place.
    """

    generation_config = _of_base("generation_config")
    loss_function = _of_base("loss_function")

    def __init__(
        self,
        model: Any,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            model, peft_config = peft_config, model
        with warnings.catch_warnings():  # PEFT asks transformers for a property by its old name
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            config = _with_classifier(model, as_config(peft_config))
            made: Any = (model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            super().__init__(*made)
        self._edits: Edits = self.base_model.edits

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = vars(cls).get("forward")
        if forward is not None and "base" in inspect.signature(forward).parameters:
            setattr(cls, "forward", by_names_too(forward))  # noqa: B010 (a method, to the type checker)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_original(args, kwargs):
            call = translate(args, kwargs, FORWARD, self.position_rules)
            return answer(super().forward, call, self.disable_adapter)
        return self.base_model.compute(super().forward, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the edits at the prompt's located tokens; see the class for the two ways to call it.

        Besides the arguments of transformers' `generate`, `prompt_lengths` (`[batch]`) and
        `intervention_locations` (`[batch, interventions, positions]`) say where the located tokens are.

        Raises:
            TypeError: a text instead of tokens, or tokens that are no tensor.
        """
        if is_original(args, kwargs):
            call = translate(args, kwargs, GENERATE, self.position_rules)
            return answer(super().generate, call, self.disable_adapter)
        if (given := args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))) is not None:
            check_tokens(given)
        return super().generate(*args, **kwargs)

    @property
    def position_rules(self) -> list[Positions | None]:
        """The active adapter's rules, in the order of its representations; none where each call gives locations."""
        return self._edits.rules[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the base model alone, in this thread.

        Calls in other threads keep their edits and trained heads.
        """
        heed(self._edits, self.base_model.reft_heads())
        with within(Surroundings(self._edits, off=True)):
            yield

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Multiply an adapter's edits: h' = h + strength (Φ(h) - h), until it is set again.

        For one call, pass `strength=` to it, a number or a dict by adapter; the two are multiplied. Strengths are
        not saved.
        """
        self._edits.check_names([adapter_name], "adapter_name", base=False)
        self._edits.strengths[adapter_name] = check_strength(strength)

    def add_adapter(self, adapter_name: str, peft_config: ReftConfig, *args: Any, **kwargs: Any) -> None:
        """Add a further adapter, as PEFT does; one of a classifier has a classifier of its own."""
        if peft_config.base_model_shape is None:  # it is no saved one, which says itself what is trained
            peft_config = _with_classifier(self.get_base_model(), peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save the adapters in PEFT's layout, all of them or none; see `pyreft.files`.

        Embeddings that were resized are no part of them, unless `save_embedding_layers=True` asks for it.
        """
        if kwargs.get("save_embedding_layers", "auto") == "auto":
            kwargs["save_embedding_layers"] = False
            tell_of_resized(self.get_base_model(), self.peft_config[self.active_adapter].base_model_name_or_path)
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(str(save_directory), **kwargs)

        def write(staged: str) -> None:
            with changing:  # behind the directory, as in loading
                super(ReftModel, self).save_pretrained(staged, **kwargs)
            add_heads(staged, self.get_base_model())
            for config in Path(staged).rglob(CONFIG_NAME):
                leave_out(config.parent, *WEIGHTS)

        save_together(save_directory, write)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the active adapter."""
        card = model_card(self.peft_config[self.active_adapter], without_adapters(self))
        (Path(output_dir) / "README.md").write_text(card, "utf-8")

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        act_fn: str | None = None,
        autocast_adapter_dtype: bool | None = None,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> "ReftModel":
        """Put a saved adapter on a base model, as `PeftModel.from_pretrained` does; files are checked first.

        Args:
            model: the base model.
            model_id: where `save` of this library or of the original wrote it.
            adapter_name: a name for the adapter.
            is_trainable: train it further.
            act_fn: for files of the original, which do not say it: the activation that the interventions were made
                with, `"linear"` if none.
            autocast_adapter_dtype: see the class.
            low_cpu_mem_usage: make no parameters whose values are then replaced by those of the file.
            **kwargs: see `PeftModel.load_adapter`; nothing of it concerns files of the original.

        Raises:
            ReftError: a damaged adapter, or one that was made for another base model.
        """
        if (subfolder := kwargs.pop("subfolder", None)) is not None:
            model_id = Path(model_id, subfolder)
        options: Any = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        with reading(model_id):
            place = legacy_place(model_id)
            if place is None:
                config = read_config(model_id)
                if act_fn is not None:
                    raise ReftError(
                        f"{model_id} says itself which activation it has; leave the argument out.", setting="act_fn"
                    )
            elif kwargs:
                raise ReftError(f"{', '.join(kwargs)}: of no use for files of the original pyreft; leave them out.")
            else:
                config = read_legacy(place, act_fn)
                config.base_model_name_or_path = remembered(getattr(model, "name_or_path", None))
            config.inference_mode = not is_trainable
            _release(model)
            if place is None:
                check_room(model_id, config, model)
            with as_it_was(model, model_id):
                adapted = cls(model, config, adapter_name, **options)
                if place is None:
                    adapted.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **options, **kwargs)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(self, model_id: str | PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter beside the others, as PEFT does; a directory is checked first.

        Raises:
            ReftError: a damaged adapter, or one that does not fit; it is then not there.
        """
        place = Path(model_id, kwargs.get("subfolder") or "")

        def load() -> Any:
            return super(ReftModel, self).load_adapter(str(model_id), adapter_name, *args, **kwargs)

        return checked_load(self, adapter_name, place, load, renamed=bool(kwargs.get("key_mapping")))

    def save_lora(self, directory: str | PathLike, *, adapter_name: str | None = None) -> None:
        """Write an adapter of the formula `lora` as a LoRA of PEFT.

        With `positions="all"` PEFT loads it. At other tokens PEFT's LoRA cannot act: it refuses the files, and
        `ReftConfig.from_lora` reads them.

        Args:
            directory: made if it is not there.
            adapter_name: the active one if not given.

        Raises:
            ReftError: edits of other formulas, or with several rules or none.
        """
        save_lora(self, directory, adapter_name or self.active_adapter)


def get_reft_model(
    model: nn.Module,
    reft_config: ReftConfig,
    set_device: bool = True,
    disable_model_grads: bool = True,
    *,
    adapter_name: str = "default",
) -> ReftModel:
    """Return a base model with new representation edits.

    Args:
        model: the base model; edits that an earlier ReftModel left on it are taken off first.
        reft_config: what to edit.
        set_device: accepted for the original's callers; the interventions are always where the layers are.
        disable_model_grads: freeze the base model, and a LoRA that is on it.
        adapter_name: a name for the adapter.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """
    _release(model)
    reft_config = as_config(reft_config)
    trained = [] if disable_model_grads else [p for p in model.parameters() if p.requires_grad]
    if reft_config.base_model_name_or_path is None:
        reft_config.base_model_name_or_path = remembered(getattr(model, "name_or_path", None))
    adapted = ReftModel(model, reft_config, adapter_name)
    if disable_model_grads:  # that of a LoRA beneath, too, which PEFT would train
        adapted.disable_model_gradients()
    copied = {p for m in adapted.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    for parameter in trained:
        if parameter not in copied:
            parameter.requires_grad_(True)
    return adapted


def _with_classifier(model: nn.Module, config: ReftConfig) -> ReftConfig:
    """The config of a classifier's adapter, with which the classifier is trained and saved, as of any PEFT method."""
    there = [name for name in task_heads(config) if isinstance(getattr(model, name, None), nn.Module)]
    if there:
        config.modules_to_save = list(dict.fromkeys((*(config.modules_to_save or ()), *there)))
    return config


def _release(model: nn.Module) -> None:
    """Take the edits of an earlier model off a base model; the earlier one then refuses to be called."""
    if tuner_of(model) is not None:
        raise ReftError(
            f"expected a base model, got a {type(model).__name__} with edits of its own. Add the adapter to it, "
            "model.add_adapter(name, config) or model.load_adapter(directory, name), or give its base model, "
            "model.get_base_model().",
            setting="model",
        )
    detach(model)
