"""Rows as batches that are padded on the right, whichever side a tokenizer pads.

Models count positions from the first column unless they are told otherwise, as `generate` tells them: where padding
comes first, a row with learned positions would be trained on others than it is asked with. Knows nothing of models.
"""

import copy
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from ..positions import IGNORED


def pads_rows(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A collator of rows with `labels` for each token."""
    return DataCollatorForSeq2Seq(_on_the_right(tokenizer), label_pad_token_id=IGNORED)


def pads_classified(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A collator of rows with one label each."""
    return DataCollatorWithPadding(_on_the_right(tokenizer))


def _on_the_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    own = copy.copy(tokenizer)  # of the tokenizer's attributes alone; what it knows is shared
    own.padding_side = "right"
    return own
