"""The original's training sets from lists of prompts and answers, edited at the last token or at several.

Also what it puts their rows into batches with.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ..data.supervised import ReftDataCollator, make_data_module
from ..positions import IGNORED
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


make_last_position_supervised_chat_data_module = make_last_position_supervised_data_module  # as in the original


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

    As `make_last_position_supervised_data_module`, with a rule for the positions. Where a prompt has fewer locations
    than the rule names, the first of them stands there again, which edits it once; -1 where it has none.
    """

    def locate(number: int, length: int) -> list[list[int]]:
        located = get_intervention_locations(
            last_position=length,
            positions=positions,
            num_interventions=num_interventions,
            share_weights=share_weights,
            pad_mode="first",  # as -1, which no call takes
        )
        return [[at if at >= 0 else places[0] for at in places] for places in located]

    return make_data_module(tokenizer, inputs, outputs, locate, nonstop=nonstop)


def make_data_collator(tokenizer: PreTrainedTokenizerBase, model: Any) -> ReftDataCollator:
    """Return the collator of the functions above; a `model` that makes decoder inputs of labels does so."""
    return ReftDataCollator(
        data_collator=DataCollatorForSeq2Seq(
            tokenizer=tokenizer, model=model, label_pad_token_id=IGNORED, padding="longest", max_length=2048
        )
    )


def make_dataloader(
    dataset: Dataset,
    batch_size: int,
    collate_fn: Callable[..., Any],
    shuffle: bool,
    sampler: Sampler | Iterable | None = None,
) -> DataLoader:
    """Return batches of a data set."""
    return DataLoader(dataset, shuffle=shuffle, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn)
