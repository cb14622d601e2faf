"""The original's training sets from lists of prompts and answers, edited at the last token or at several."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.supervised import make_data_module
from .locations import get_intervention_locations


def make_last_position_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    num_interventions: int = 1,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Return a training set that is edited at the last token of each prompt, with its collator.

    Args:
        tokenizer: of the base model, with a padding token.
        model: the base model; accepted for the original's callers.
        inputs, outputs: prompts and answers, one for one.
        num_interventions: how many interventions the model has.
        nonstop: do not close the answers with EOS.

    Returns:
        `train_dataset`, `eval_dataset` (none) and `data_collator`, for `ReftTrainerForCausalLM(**...)`.
    """
    return make_data_module(
        tokenizer, inputs, outputs, lambda number, length: [[length - 1]] * num_interventions, nonstop=nonstop
    )


def make_multiple_position_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """Return a training set that is edited at several tokens of each prompt, with its collator.

    As `make_last_position_supervised_data_module`, with a rule for the positions. A prompt that is too short for
    the rule has fewer locations.
    """

    def locate(number: int, length: int) -> list[list[int]]:
        return get_intervention_locations(
            last_position=length,
            positions=positions,
            num_interventions=num_interventions,
            share_weights=share_weights,
            pad_mode="first",  # as -1, which edits nothing
        )

    return make_data_module(tokenizer, inputs, outputs, locate, nonstop=nonstop)
