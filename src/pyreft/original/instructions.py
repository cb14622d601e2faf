"""Data sets of texts, edited in what comes before an answer: labels, instructions, completions, and preferences."""

from typing import Any

import torch
from torch import nn

from ..data.files import alpaca_prompt
from ..positions import IGNORED
from .datasets import ReftDataset, tokenize_pair, truncated_ids

no_header_prompt_template = "### Instruction:\n%s\n\n### Response:\n"
prompt_no_input = alpaca_prompt("%s")
prompt_input = alpaca_prompt("%s", "%s")


class ReftClassificationDataset(ReftDataset):
    """Texts with a label each, which is a text, too; edited in the texts.

    As in the original, the last token of the text is not among those that a rule counts, and labels are the token ids
    of the label, of a length of their own.

    Args:
        kwargs: besides those of `ReftDataset`, `input_field` and `label_field`; none for the latter leaves labels out.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.input_field: str = kwargs["input_field"]
        self.label_field: str | None = kwargs["label_field"]

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        ids = truncated_ids(self.tokenizer, data_item[self.input_field])
        result = {"input_ids": ids}
        if self.label_field is not None:
            result["labels"] = truncated_ids(self.tokenizer, data_item[self.label_field])
        return result, len(ids) - 1


class ReftGenerationDataset(ReftDataset):
    """Prompts and their completions, as they stand; edited in the prompts.

    As in the original, the last token of the prompt is not among those that a rule counts.

    Args:
        kwargs: besides those of `ReftDataset`, `prompt_field` and `completion_field` (`"prompt"`, `"completion"`),
            and `no_stop` to add no EOS token.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.prompt_field: str = kwargs.get("prompt_field", "prompt")
        self.completion_field: str = kwargs.get("completion_field", "completion")
        self.no_stop: bool = kwargs.get("no_stop", False)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        result, length = tokenize_pair(
            self, data_item[self.prompt_field], data_item[self.completion_field], end=not self.no_stop
        )
        return result, length - 1


class _Instructions(ReftDataset):
    """Rows with an instruction, perhaps with an input, in the template of the Alpaca data set."""

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.instruction_field: str = kwargs.get("instruction_field", "instruction")
        self.input_field: str = kwargs.get("input_field", "input")
        self.no_stop: bool = kwargs.get("no_stop", False)

    def prompt(self, data_item: Any) -> str:
        """What the model reads before it answers."""
        return alpaca_prompt(data_item[self.instruction_field], data_item.get(self.input_field) or "")


class ReftSupervisedDataset(_Instructions):
    """Instructions and their answers in the template of the Alpaca data set; edited in the prompts.

    As in the original, the last token of the prompt is not among those that a rule counts.

    Args:
        kwargs: besides those of `ReftDataset`, `instruction_field`, `input_field` and `output_field`
            (`"instruction"`, `"input"`, `"output"`), and `no_stop` to add no EOS token.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        super().preprocess(kwargs)
        self.output_field: str = kwargs.get("output_field", "output")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        answer = data_item[self.output_field]
        result, length = tokenize_pair(self, self.prompt(data_item), answer, end=not self.no_stop)
        return result, length - 1


class ReftPreferenceDataset(_Instructions):
    """Instructions with a chosen and a rejected answer; the chosen one is learned.

    As in the original, the model reads the rejected answer and its labels are the tokens of the chosen one, place by
    place, the shorter of the two padded. With `substitute=False` it reads the chosen answer, too, which is ordinary
    supervised finetuning. A split other than `"train"` has no answers: its items are prompts.

    Args:
        kwargs: besides those of `ReftDataset`, `instruction_field`, `input_field`, `chosen_output_field` and
            `rejected_output_field` (`"instruction"`, `"input"`, `"chosen_output"`, `"rejected_output"`), and
            `no_stop` to add no EOS token.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        super().preprocess(kwargs)
        self.chosen_output_field: str = kwargs.get("chosen_output_field", "chosen_output")
        self.rejected_output_field: str = kwargs.get("rejected_output_field", "rejected_output")
        self.substitute: bool = kwargs.get("substitute", True)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        prompt = self.prompt(data_item)
        if self.data_split != "train":
            ids = truncated_ids(self.tokenizer, prompt)
            return {"input_ids": ids}, len(ids)
        end = not self.no_stop
        result, length = tokenize_pair(self, prompt, data_item[self.chosen_output_field], end=end)
        if not self.substitute:
            return result, length
        read, _ = tokenize_pair(self, prompt, data_item[self.rejected_output_field], end=end)
        ids, labels = read["input_ids"], result["labels"]
        width = max(len(ids), len(labels))
        return {
            "input_ids": nn.functional.pad(ids, (0, width - len(ids)), value=self.tokenizer.pad_token_id),
            "labels": nn.functional.pad(labels, (0, width - len(labels)), value=IGNORED),
            "attention_mask": (torch.arange(width) < len(ids)).int(),
        }, length
