"""The original's ways to save and load: `save`, `load`, and the interventions of a model alone."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Self

from peft import PeftModel
from torch import nn

from ..errors import ReftError
from ..files.online import hub_told
from ..files.original import adapter_place, fill, legacy_place, read_model
from ..files.trained_heads import trained_heads
from ..files.weights import overwrite
from ..interventions import Intervention, register
from .members import base_parameters


class OriginalSaving(PeftModel):
    """A PEFT model with representation edits that saves and loads in the original's words, in PEFT's layout."""

    def save(
        self,
        save_directory: str | PathLike,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> None:
        """Save the adapter to a directory, and upload it to the Hugging Face hub if asked to.

        Raises:
            ReftError: `include_model` where parameters of the base model are trained, which no adapter holds; the hub
                refuses it or cannot be reached.
        """
        if include_model:
            _refuse_a_trained_base(self)
        self.save_pretrained(save_directory)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            api = HfApi()
            with hub_told(f"the adapter is in {save_directory}, but was not uploaded to {hf_repo_name!r}"):
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
        self._edits.check_names([name], "adapter_name", base=False)
        overwrite(self, name, adapter_place(load_directory), include_model)

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
    ) -> Self:
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
            ReftError: a damaged adapter, or one that was made for another base model; the hub has none of the name, or
                cannot be reached.
        """
        if from_huggingface_hub:
            from huggingface_hub import snapshot_download

            with hub_told(f"no adapter {str(load_directory)!r} could be read from the hub"):
                load_directory = snapshot_download(str(load_directory), local_dir=local_directory)
        for intervention in interventions:
            register(intervention)
        load_directory = adapter_place(load_directory)
        place = legacy_place(load_directory)
        values = read_model(place, dict(model.named_parameters())) if include_model and place is not None else []
        options: dict[str, Any] = {"is_trainable": True, "act_fn": act_fn}
        adapted = cls.from_pretrained(model, load_directory, **options)
        fill(values)
        return adapted.eval()


def _refuse_a_trained_base(model: PeftModel) -> None:
    """Say that an adapter's files do not hold the base model, where some of it is trained."""
    trained = [name for name, parameter in base_parameters(model) if parameter.requires_grad]
    if trained:
        heads = tuple(f"{name}." for name in trained_heads(model.get_base_model()))
        trained = [name for name in trained if not name.startswith(heads)]
    if trained:
        raise ReftError(
            f"an adapter's files do not hold the base model, of which {len(trained)} parameters are "
            f"trained ({trained[0]}, ...). Name these modules in ReftConfig(modules_to_save=[...]), which are "
            "always saved, or use include_model=False here and save the base model with "
            "reft_model.unload().save_pretrained(...).",
            setting="include_model",
        )
