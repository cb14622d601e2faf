"""Pairs of conversations, one better than the other, for reward models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.supervised import stack_locations, tell_of_left_padding
from ..errors import ReftError
from .datasets import ReftDataset, truncated_ids

SIDES = (("chosen", 1.0), ("rejected", 0.0))  # with the reward of those that have none


class ReftRewardDataset(ReftDataset):
    """Pairs of conversations with a common beginning, in which they are edited.

    An item has `chosen_output`, `rejected_output`, their `_mask`s, `intervention_locations`, `id`, and
    `chosen_reward` and `rejected_reward` if the rows have rewards; the better conversation is then the chosen one,
    otherwise it is A.

    Args:
        kwargs: besides those of `ReftDataset`, `conv_A_field` and `conv_B_field` (`"conv_A"`, `"conv_B"`), chats of
            `{"role", "content"}`, or answers to the text in `prompt_field` if it is given; `conv_A_reward_field` and
            `conv_B_reward_field`, or neither.

    Raises:
        ReftError: a tokenizer without chat template.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.conv_A_field: str = kwargs.get("conv_A_field", "conv_A")
        self.conv_B_field: str = kwargs.get("conv_B_field", "conv_B")
        self.prompt_field: str | None = kwargs.get("prompt_field")
        self.conv_A_reward_field: str | None = kwargs.get("conv_A_reward_field")
        self.conv_B_reward_field: str | None = kwargs.get("conv_B_reward_field")
        self.fields_to_pad = self.fields_to_mask = [f"{side}_output" for side, _ in SIDES]
        if not self.tokenizer.chat_template:
            raise ReftError("The tokenizer has no chat template to write conversations with; set one in it.")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        texts = [self._text(data_item, field) for field in (self.conv_A_field, self.conv_B_field)]
        result: dict[str, Any] = {}
        if self.conv_A_reward_field is not None and self.conv_B_reward_field is not None:
            rewards = [float(data_item[field]) for field in (self.conv_A_reward_field, self.conv_B_reward_field)]
            if rewards[0] < rewards[1]:
                texts.reverse()
                rewards.reverse()
            result["chosen_reward"], result["rejected_reward"] = rewards
        chosen, rejected = (truncated_ids(self.tokenizer, text) for text in texts)
        result["chosen_output"], result["rejected_output"] = chosen, rejected
        width = min(len(chosen), len(rejected))
        different = (chosen[:width] != rejected[:width]).nonzero()
        # of conversations of which one begins with the other, the last common token is left alone as in the original
        return result, int(different[0]) if len(different) else width - 1

    def _text(self, data_item: Any, field: str) -> str:
        chat = data_item[field]
        if self.prompt_field is not None:
            question = {"role": "user", "content": data_item[self.prompt_field]}
            chat = [question, {"role": "assistant", "content": chat}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        return text.removeprefix(self.tokenizer.bos_token or "")


@dataclass
class ReftRewardCollator:
    """Puts pairs of conversations into one batch, each chosen one before its rejected one.

    The batch has `input_ids`, `attention_mask`, `reward` and `intervention_locations`.

    Args:
        tokenizer: pads, with `padding`, `max_length` and `pad_to_multiple_of` as its `pad` takes them.
        shift: move the locations with left padding. Programs for the original, whose collator did not, do it
            themselves; a batch that would need it warns.
    """

    tokenizer: PreTrainedTokenizerBase
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    shift: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [
            {
                "input_ids": feature[f"{side}_output"],
                "attention_mask": feature[f"{side}_output_mask"],
                "reward": feature.get(f"{side}_reward", reward),
            }
            for feature in features
            for side, reward in SIDES
        ]
        batch = dict(
            self.tokenizer.pad(
                rows,
                padding=self.padding,
                max_length=self.max_length if self.padding == "max_length" else None,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
        )
        left = self.tokenizer.padding_side == "left"
        width = batch["input_ids"].shape[-1]
        shifts = [width - len(row["input_ids"]) if left else 0 for row in rows]
        if any(shifts) and not self.shift:
            tell_of_left_padding(self)
            shifts = [0] * len(rows)
        locations = [feature["intervention_locations"] for feature in features for _ in SIDES]
        return {**batch, "intervention_locations": stack_locations(locations, shifts)}
