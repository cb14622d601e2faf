"""`ReftModel`: a PEFT model that also answers to the calls of the original library."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from torch import Tensor, nn

from .errors import ReftError
from .files.adapter import WEIGHTS, as_it_was, check_room, is_adapter, load_tensors, model_card, read_config
from .files.original import fill, find_legacy, read_interventions, read_legacy, read_model
from .files.together import leave_out, reading, save_together
from .files.trained_heads import add_heads, saved_heads, trained_heads
from .interventions import Intervention, register
from .original.locations import read_subspaces, read_unit_locations
from .places.structure import without_adapters
from .sharded import is_sharded
from .tuner.config import ReftConfig, Representation
from .tuner.layer import ReftLayer
from .tuner.locator import GIVEN, LOCATIONS, SUBSPACES, Locator
from .tuner.tuner import detach, locator_of, reft_layers


class ReftModel(PeftModel):
    """A frozen base model with representation edits.

    Called as any transformers model, it returns what that returns. Called in the manner of the original library,
    with a dict of inputs first or with `unit_locations`, it returns a pair: the base model's output (none unless
    `output_original_output=True`) and the edited one.

    Args:
        model: the base model; it is frozen, and edited in place.
        peft_config: what to edit.
        adapter_name: a name for the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: ReftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        base: Any = model
        inner = base.peft_config if isinstance(base, PeftModel) else None  # of a LoRA, say: two sets, kept apart
        if inner is not None:
            base.peft_config = {}
        try:
            with warnings.catch_warnings():  # PEFT asks transformers for a property by its old name
                warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                super().__init__(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if inner is not None:
                self.base_model.peft_config = base.peft_config
        finally:
            if inner is not None:
                base.peft_config = inner
        self._locator: Locator = self.base_model._locator

    # -- calls ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_attached()
        if not _is_original_call(args, kwargs):
            return self.base_model.compute(super().forward, args, kwargs)
        kwargs = self._translate(args, kwargs)
        original = kwargs.pop("output_original_output", False)
        base = None
        if original:
            with self.disable_adapter():
                base = super().forward(**{key: value for key, value in kwargs.items() if key not in GIVEN})
        return base, super().forward(**kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the edits at the prompt's located tokens; see the class for the two ways to call it.

        Besides the arguments of transformers' `generate`, `prompt_lengths` (`[batch]`) and
        `intervention_locations` (`[batch, interventions, positions]`) say where the located tokens are.
        """
        self._check_attached()
        if not _is_original_call(args, kwargs):
            return super().generate(*args, **kwargs)
        if not kwargs.pop("intervene_on_prompt", True):
            raise ReftError(
                "intervene_on_prompt: edits begin in the prompt; for tokens that are generated, too, use "
                "ReftConfig(positions='all')."
            )
        kwargs = self._translate(args, kwargs)
        base = None
        if kwargs.pop("output_original_output", False):
            with self.disable_adapter():
                base = super().generate(**{key: value for key, value in kwargs.items() if key not in GIVEN})
        return base, super().generate(**kwargs)

    def _translate(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of an original call as those of a transformers call."""
        if len(args) > 1:
            raise ReftError("Only the inputs go by position; name the other arguments, as in unit_locations=... .")
        call = {**(args[0] if args else kwargs.pop("base", {})), **kwargs}
        if call.pop("sources", None) not in (None, [None]):
            raise ReftError("sources: ReFT learns its edits and takes none from another input; pass no sources.")
        unit_locations, subspaces = call.pop("unit_locations", None), call.pop(SUBSPACES, None)
        rows = len(next(call[name] for name in ("input_ids", "inputs_embeds") if name in call))
        count = len(self._locator.rules[self.active_adapter])
        if subspaces is not None:
            call[SUBSPACES] = read_subspaces(subspaces, rows, count)
        if unit_locations is not None:
            call[LOCATIONS] = read_unit_locations(unit_locations, rows, count)
        elif None in self._locator.rules[self.active_adapter] and LOCATIONS not in call:
            raise ReftError(
                "unit_locations: this model's config has no position rule, so each call says which tokens to edit: "
                'unit_locations={"sources->base": (None, [interventions][batch][positions])}.'
            )
        return call

    def _check_attached(self) -> None:
        if self._locator.removed:
            raise ReftError(
                "This ReftModel's edits were taken off its base model when another ReftModel was made from it. "
                "Load the adapter again, or add several to one model with load_adapter()."
            )

    # -- the original's members -----------------------------------------------------------------------------------

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The active adapter's interventions, in the order of its representations."""
        return self._interventions(self.active_adapter)

    def _interventions(self, adapter_name: str) -> dict[str, Intervention]:
        named: dict[int, tuple[str, Intervention]] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, ReftLayer):
                named |= {index: (f"{name}.{index}", module) for index, module in layer.of(adapter_name)}
        return dict(named[index] for index in sorted(named))

    def count_parameters(self, include_model: bool = False) -> int:
        """How many parameters are trained: those of the interventions, with `include_model` any others, too."""
        modules = [self] if include_model else reft_layers(self)
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, for an optimiser of one's own."""
        return [p for p in self.parameters() if p.requires_grad]

    def set_zero_grad(self) -> None:
        """Drop the gradients of the interventions."""
        for layer in reft_layers(self):
            layer.zero_grad()

    def disable_model_gradients(self) -> None:
        """Freeze the base model, not what an adapter trains."""
        for _, parameter in self._base_parameters():
            parameter.requires_grad_(False)

    def enable_model_gradients(self) -> None:
        """Train the base model, too. Files of an adapter do not hold it: save it apart."""
        for _, parameter in self._base_parameters():
            parameter.requires_grad_(True)

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the base model that no adapter holds or replaces, by their names in it."""
        held = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, ReftLayer | ModulesToSaveWrapper)
            for parameter in module.parameters()
        }
        for name, parameter in self.get_base_model().named_parameters():
            if id(parameter) not in held:
                yield name, parameter

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, and their share of the base model's."""
        edits, trained = self.count_parameters(), self.count_parameters(include_model=True)
        everything = sum(p.numel() for p in self.parameters())
        own = sum(p.numel() for layer in reft_layers(self) for p in layer.parameters())
        base = everything - own
        print(
            f"trainable intervention params: {edits:,d} || trainable model params: {trained - edits:,d}\n"
            f"model params: {base:,d} || trainable%: {100 * trained / base:.6f}"
        )

    def set_device(self, device: str | torch.device, set_model: bool = True) -> "ReftModel":
        """Move the interventions, and with `set_model` the base model, to a device."""
        for module in [self] if set_model else reft_layers(self):
            module.to(device)
        return self

    def get_device(self) -> torch.device:
        """The device of the base model."""
        return next(self.get_base_model().parameters()).device

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Multiply an adapter's edits: h' = h + strength (Φ(h) - h), until it is set again.

        For one call, pass `strength=` to it, a number or a dict by adapter; the two are multiplied. Strengths are
        not saved.
        """
        self._locator.check_names([adapter_name], "adapter_name", base=False)
        self._locator.strengths[adapter_name] = float(strength)

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save the adapters in PEFT's layout, all of them or none; see `pyreft.files`."""
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(str(save_directory), **kwargs)

        def write(staged: str) -> None:
            super(ReftModel, self).save_pretrained(staged, **kwargs)
            add_heads(staged, self.get_base_model())
            for config in Path(staged).rglob(CONFIG_NAME):
                leave_out(config.parent, *WEIGHTS)

        save_together(save_directory, write)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the active adapter."""
        card = model_card(self.peft_config[self.active_adapter], without_adapters(self))
        (Path(output_dir) / "README.md").write_text(card, "utf-8")

    def save(
        self,
        save_directory: str | PathLike,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> None:
        """Save the adapter to a directory, and upload it to the Hugging Face hub if asked to.

        Raises:
            ReftError: `include_model` where parameters of the base model are trained, which no adapter holds.
        """
        trained = [name for name, parameter in self._base_parameters() if parameter.requires_grad]
        if include_model and trained:
            heads = tuple(f"{name}." for name in trained_heads(self.get_base_model()))
            trained = [name for name in trained if not name.startswith(heads)]
        if include_model and trained:
            raise ReftError(
                f"include_model: an adapter's files do not hold the base model, of which {len(trained)} parameters are "
                f"trained ({trained[0]}, ...). Name these modules in ReftConfig(modules_to_save=[...]), which are "
                "always saved, or use include_model=False here and save the base model with "
                "reft_model.unload().save_pretrained(...)."
            )
        self.save_pretrained(save_directory)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            api = HfApi()
            repo = api.create_repo(hf_repo_name, exist_ok=True)
            api.upload_folder(
                folder_path=str(save_directory), repo_id=repo.repo_id, commit_message="Upload a ReFT adapter"
            )

    def save_intervention(self, save_directory: str | PathLike, include_model: bool = True) -> None:
        """Save the adapter, as `save` does; what it writes is complete, so `load` reads it as well."""
        self.save(save_directory, include_model=include_model)

    def load_intervention(
        self, load_directory: str | PathLike, include_model: bool = True, *, adapter_name: str | None = None
    ) -> None:
        """Load the weights of a saved adapter into one of this model, whose places must be the same.

        The parameters are overwritten where they are, so a compiled model or an optimiser goes on with them.

        Args:
            load_directory: where this library saved, or the original or its trainers (a checkpoint's folder).
            include_model: for files of the original: load what it trained of the base model, too.
            adapter_name: the adapter to overwrite, the active one if not given.

        Raises:
            ReftError: files that are missing, damaged, or of another adapter; the model is then as it was.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._locator.check_names([name], "adapter_name", base=False)
        place = _legacy_place(load_directory)
        layers = self.peft_config[name].base_model_shape["num_hidden_layers"]
        representations = self.peft_config[name].expand(layers)
        if place is None:
            with reading(load_directory):
                theirs = _edits(read_config(load_directory).expand(layers))
                if theirs != (ours := _edits(representations)):
                    raise ReftError(f"{load_directory}: expected the edits of this model, {ours}; it holds {theirs}.")
                heads = saved_heads(load_directory, self.get_base_model())
                state = load_tensors(load_directory, self._saved(name) | heads)
            with torch.no_grad():
                for key, tensor in heads.items():
                    tensor.copy_(state.pop(key))
            set_peft_model_state_dict(self, state, name)
            return
        values = read_interventions(place, representations, self._interventions(name).values())
        if include_model:  # a module that the adapter trains stands for the base model's
            parameters = {
                re.sub(rf"\b(original_module|modules_to_save\.{re.escape(name)})\.", "", path): parameter
                for path, parameter in self.get_base_model().named_parameters()
            }
            values += read_model(place, parameters)
        fill(values)

    @classmethod
    def load(
        cls,
        load_directory: str | PathLike,
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
        *,
        act_fn: str | None = None,
        interventions: Sequence[type[Intervention]] = (),
    ) -> "ReftModel":
        """Put a saved adapter on a base model; edits that an earlier ReftModel left there are taken off first.

        Args:
            load_directory: where `save` of this library or of the original wrote it, or a repository of the hub with
                `from_huggingface_hub`.
            model: the base model.
            local_directory: where to keep the files from the hub.
            include_model: for files of the original: load what it trained of the base model, too.
            act_fn: see `from_pretrained`.
            interventions: classes of one's own that the adapter is made of; a file alone brings in no class.

        Raises:
            ReftError: a damaged adapter, or one that was made for another base model.
        """
        if from_huggingface_hub:
            from huggingface_hub import snapshot_download

            load_directory = snapshot_download(str(load_directory), local_dir=local_directory)
        for intervention in interventions:
            register(intervention)
        place = _legacy_place(load_directory)
        values = read_model(place, dict(model.named_parameters())) if include_model and place is not None else []
        adapted = cls.from_pretrained(model, load_directory, is_trainable=True, act_fn=act_fn)
        fill(values)
        return adapted.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        act_fn: str | None = None,
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
            **kwargs: see `PeftModel.load_adapter`; nothing of it concerns files of the original.

        Raises:
            ReftError: a damaged adapter, or one that was made for another base model.
        """
        if (subfolder := kwargs.pop("subfolder", None)) is not None:
            model_id = Path(model_id, subfolder)
        with reading(model_id):
            place = _legacy_place(model_id)
            if place is None:
                config = read_config(model_id)
                if act_fn is not None:
                    raise ReftError(f"act_fn: {model_id} says itself which activation it has; leave the argument out.")
            elif kwargs:
                raise ReftError(f"{', '.join(kwargs)}: of no use for files of the original pyreft; leave them out.")
            else:
                config = read_legacy(place, act_fn)
                config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
            config.inference_mode = not is_trainable
            _release(model)
            if place is None:
                check_room(model_id, config, model)
            with as_it_was(model, model_id):
                adapted = cls(model, config, adapter_name)
                if place is None:
                    adapted.load_adapter(
                        model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=False, **kwargs
                    )
        return adapted if is_trainable else adapted.eval()

    def load_adapter(self, model_id: str | PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter beside the others, as PEFT does; a directory is checked first.

        Raises:
            ReftError: a damaged adapter, or one that does not fit; it is then not there.
        """
        place, known = Path(model_id, kwargs.get("subfolder") or ""), adapter_name in self.peft_config
        with reading(place):
            if is_adapter(place) and not known:
                check_room(place, read_config(place), self.get_base_model())
            elif is_adapter(place) and not kwargs.get("key_mapping") and not any(map(is_sharded, self.parameters())):
                heads = saved_heads(place, self.get_base_model())
                load_tensors(place, self._saved(adapter_name) | heads)  # PEFT would load whatever the file holds
            try:
                found = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
                if found.missing_keys or found.unexpected_keys:
                    raise ReftError(f"{place}: the file does not fit its config: {found}.")
            except Exception as error:
                if not known and adapter_name in self.peft_config:
                    self.delete_adapter(adapter_name)
                if "size mismatch" in str(error):
                    raise ReftError(f"{place}: {error}") from error
                raise
        return found

    def _saved(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of an adapter, by their names in its file."""
        return get_peft_model_state_dict(self, adapter_name=adapter_name)


def _edits(representations: list[Representation]) -> list[tuple]:
    """What says, beside the tensors, which edits they make, at whatever tokens."""
    return [(entry.layer, entry.component, entry.intervention, entry.act_fn) for entry in representations]


def _legacy_place(directory: str | PathLike) -> Path | None:
    return None if is_adapter(directory) else find_legacy(directory)


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
        disable_model_grads: freeze the base model.
        adapter_name: a name for the adapter.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """
    _release(model)
    trained = [] if disable_model_grads else [p for p in model.parameters() if p.requires_grad]
    if reft_config.base_model_name_or_path is None:
        reft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    adapted = ReftModel(model, reft_config, adapter_name)
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapted


def _release(model: nn.Module) -> None:
    if locator_of(model) is not None:
        detach(model)


def _is_original_call(args: tuple, kwargs: dict) -> bool:
    return bool(args and isinstance(args[0], Mapping)) or "unit_locations" in kwargs or "base" in kwargs
