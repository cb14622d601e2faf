"""Trainers for adapted models: transformers' `Trainer` that keeps the columns which say where to edit."""

from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from ..locator import LENGTHS, LOCATIONS


class ReftTrainer(Trainer):
    """`transformers.Trainer` for models with representation edits.

    A data set may have a column `intervention_locations`, `[interventions][positions]` for each row, or
    `prompt_lengths`; both reach the model. Checkpoints are complete adapters.

    Args:
        tokenizer: what `Trainer` calls `processing_class` today; the original's name is taken, too.
    """

    def __init__(self, *args: Any, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        self.label_names = self.args.label_names or ["labels"]  # Trainer cannot infer them for a PEFT model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*self._signature_columns, LOCATIONS, LENGTHS]


class ReftTrainerForCausalLM(ReftTrainer):
    """The trainer for language models, under the original's name."""
