"""`ReftModel`: a PEFT model that also answers to the calls of the original library."""

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from .checkpoint import check_tensors, model_card, read_config, write_beside
from .compat import read_unit_locations
from .config import ReftConfig
from .errors import ReftError
from .heads import add_heads
from .interventions import Intervention
from .locator import LOCATIONS, Locator
from .tuner import ReftLayer, detach, locator_of, reft_layers


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
            return super().forward(*args, **kwargs)
        kwargs = self._translate(args, kwargs)
        original = kwargs.pop("output_original_output", False)
        base = None
        if original:
            with self.disable_adapter():
                base = super().forward(**{key: value for key, value in kwargs.items() if key != LOCATIONS})
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
                base = super().generate(**{key: value for key, value in kwargs.items() if key != LOCATIONS})
        return base, super().generate(**kwargs)

    def _translate(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of an original call as those of a transformers call."""
        if len(args) > 1:
            raise ReftError("Only the inputs go by position; name the other arguments, as in unit_locations=... .")
        call = {**(args[0] if args else kwargs.pop("base", {})), **kwargs}
        for name in ("sources", "subspaces"):
            if call.pop(name, None) is not None:
                raise ReftError(f"{name}: not supported yet.")
        unit_locations = call.pop("unit_locations", None)
        if unit_locations is not None:
            rows = len(next(call[name] for name in ("input_ids", "inputs_embeds") if name in call))
            count = len(self._locator.rules[self.active_adapter])
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
        named: dict[int, tuple[str, Intervention]] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, ReftLayer):
                named |= {index: (f"{name}.{index}", module) for index, module in layer.of(self.active_adapter)}
        return dict(named[index] for index in sorted(named))

    def count_parameters(self, include_model: bool = False) -> int:
        """How many parameters are trained: those of the interventions, with `include_model` any others, too."""
        total = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if include_model:
            return total
        edits = {id(p) for layer in reft_layers(self) for p in layer.parameters()}
        return sum(p.numel() for p in self.parameters() if p.requires_grad and id(p) in edits)

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

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save the adapters in PEFT's layout; a save is complete or leaves nothing behind."""
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(str(save_directory), **kwargs)

        def write(staged: str) -> None:
            super(ReftModel, self).save_pretrained(staged, **kwargs)
            add_heads(staged, self.get_base_model())

        write_beside(save_directory, write)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the active adapter."""
        (Path(output_dir) / "README.md").write_text(model_card(self.peft_config[self.active_adapter]), "utf-8")

    def save(
        self, save_directory: str | PathLike, save_to_hf_hub: bool = False, hf_repo_name: str = "my-awesome-model"
    ) -> None:
        """Save the adapter to a directory, and upload it to the Hugging Face hub if asked to."""
        self.save_pretrained(save_directory)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            api = HfApi()
            repo = api.create_repo(hf_repo_name, exist_ok=True)
            api.upload_folder(
                folder_path=str(save_directory), repo_id=repo.repo_id, commit_message="Upload a ReFT adapter"
            )

    @classmethod
    def load(
        cls,
        load_directory: str | PathLike,
        model: nn.Module,
        from_huggingface_hub: bool = False,
        local_directory: str | None = None,
    ) -> "ReftModel":
        """Put a saved adapter on a base model; edits that an earlier ReftModel left there are taken off first.

        Args:
            load_directory: where `save` wrote it, or a repository of the hub with `from_huggingface_hub`.
            model: the base model.
            local_directory: where to keep the files from the hub.

        Raises:
            ReftError: a damaged adapter, or one that was made for another base model.
        """
        if from_huggingface_hub:
            from huggingface_hub import snapshot_download

            load_directory = snapshot_download(str(load_directory), local_dir=local_directory)
        return cls.from_pretrained(model, load_directory, is_trainable=True).eval()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "ReftModel":
        """Put a saved adapter on a base model, as `PeftModel.from_pretrained` does; files are checked first."""
        config = read_config(model_id)
        config.inference_mode = not is_trainable
        _release(model)
        adapted = cls(model, config, adapter_name)
        shapes = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(adapted, adapter_name=adapter_name).items()}
        try:
            check_tensors(model_id, shapes)
        except ReftError:
            detach(model)
            raise
        adapted.load_adapter(
            str(model_id), adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=False, **kwargs
        )
        return adapted if is_trainable else adapted.eval()


def get_reft_model(
    model: nn.Module, reft_config: ReftConfig, set_device: bool = True, disable_model_grads: bool = True
) -> ReftModel:
    """Return a base model with new representation edits.

    Args:
        model: the base model; edits that an earlier ReftModel left on it are taken off first.
        reft_config: what to edit.
        set_device: accepted for the original's callers; the interventions are always where the layers are.
        disable_model_grads: freeze the base model.

    Raises:
        ReftError: a layer, component, rank or intervention that does not fit the model, before it is touched.
    """
    _release(model)
    trained = [] if disable_model_grads else [p for p in model.parameters() if p.requires_grad]
    if reft_config.base_model_name_or_path is None:
        reft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    adapted = ReftModel(model, reft_config)
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapted


def _release(model: nn.Module) -> None:
    if locator_of(model) is not None:
        detach(model)


def _is_original_call(args: tuple, kwargs: dict) -> bool:
    return bool(args and isinstance(args[0], Mapping)) or "unit_locations" in kwargs or "base" in kwargs
