"""Data sets in the original's manner: rows of fields in; token ids, labels, masks and locations out.

A subclass says how a row becomes tokens and where its prompt ends. Nothing is known here of models or edits.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.supervised import encode_pair, told_of_doubled_bos
from ..errors import ReftError
from ..positions import IGNORED
from .locations import get_intervention_locations, parse_positions

LOCATION_ARGUMENTS = (
    *("last_position", "num_interventions", "positions", "first_n", "last_n", "share_weights"),
    "pad_mode",
)


class ReftDataset(Dataset):
    """Rows as training examples with `intervention_locations`; subclass it and say how a row is tokenized.

    An item has `input_ids`, `attention_mask`, `labels` if `tokenize` gives any, `intervention_locations`
    (`[interventions][positions]`), `id` (the number of its row), and `subspaces` if its row has them. As in the
    original, which its users' evaluation code relies on, one masked padding token stands before the text
    (`pad_mode="first"`, so that locations count from 1 and a prompt too short for its rule has 0 for the missing
    ones) or behind it (`"last"`). With `"none"` nothing is added, and missing locations are -1.

    Args:
        task: a name; of the data set on the hub if `data_path` is none or a configuration of it.
        data_path: a `.json` or `.jsonl` file, or a configuration of `task`.
        tokenizer: of the base model, with a padding token.
        data_split: the split of a data set from the hub.
        dataset: the rows themselves, instead of a file: a list of dicts or a `datasets.Dataset`.
        seed: of the draw, if `max_n_example` asks for fewer rows than there are.
        kwargs: `position`, a rule such as `"f1+l1"`; `num_interventions`; perhaps `share_weights`, `pad_mode`,
            `fields_to_pad`, `fields_to_mask`; and what the subclass asks for.

    Raises:
        ReftError: no such file or field, an unknown rule, a tokenizer without padding token, or a row without labels.
    """

    def __init__(
        self,
        task: str,
        data_path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name in ("position", "num_interventions"):
            if kwargs.get(name) is None:
                raise ReftError(f"{type(self).__name__}: the argument {name!r} is missing.")
        if tokenizer.pad_token_id is None:
            raise ReftError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token first.")
        self.tokenizer = tokenizer
        self.first_n, self.last_n = parse_positions(kwargs["position"])
        self.task, self.data_path, self.data_split, self.dataset = task, data_path, data_split, dataset
        self.seed, self.max_n_example = seed, max_n_example
        self.pad_mode: str = kwargs.pop("pad_mode", "first")
        self.fields_to_pad: list[str] = kwargs.pop("fields_to_pad", ["input_ids", "labels"])
        self.fields_to_mask: list[str] = kwargs.pop("fields_to_mask", ["input_ids"])
        self.row = 0  # the one that is being tokenized, for messages
        self._doubled_bos = False
        self.preprocess(kwargs)
        self.task_dataset = self.load_dataset()
        self.postprocess(kwargs)
        self.result = [self._item(row, data_item, kwargs) for row, data_item in enumerate(self.task_dataset)]

    # -- what a subclass may say ----------------------------------------------------------------------------------

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the arguments, before the rows are loaded."""

    def postprocess(self, kwargs: dict[str, Any]) -> None:
        """Look at `self.task_dataset`, before its rows are tokenized."""

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Return the token ids and labels of a row as a dict, and how many first tokens may be edited."""
        raise NotImplementedError(f"{type(self).__name__} has to say how a row becomes tokens: define tokenize().")

    def load_dataset(self) -> Any:
        """Return the rows: those given, those of a file, or those of a data set on the hub."""
        rows = self.dataset
        if rows is None:
            rows = _load(self.task, self.data_path, self.data_split)
        if self.max_n_example is not None:
            rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
            rows = rows.shuffle(seed=self.seed).select(range(min(self.max_n_example, len(rows))))
        self.raw_dataset = rows if self.data_split != "train" else None
        return rows

    def get_intervention_locations(self, **kwargs: Any) -> list[list[int]]:
        """Return the locations of a row; see the function of this name, which ignores no argument as this does."""
        return get_intervention_locations(**{name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs})

    def compute_intervention_and_subspaces(
        self, id: int, data_item: Any, result: dict[str, Any], last_position: int, **kwargs: Any
    ) -> dict[str, Any]:
        """Add to a tokenized row its locations, masks, number and subspaces, and the padding token.

        Args:
            id: the number of the row.
            last_position: how many first tokens may be edited.
        """
        mode = "last" if self.pad_mode == "last" else "first"
        places = self.get_intervention_locations(
            last_position=last_position, first_n=self.first_n, last_n=self.last_n, pad_mode=mode, **kwargs
        )
        for field in {*self.fields_to_pad, *self.fields_to_mask} & result.keys():
            result[field] = torch.as_tensor(result[field])
        self._check(id, result)
        single = len(self.fields_to_mask) == 1
        for field in self.fields_to_mask:
            name = "attention_mask" if single else f"{field}_mask"
            mask = result[name] if name in result else self._text_mask(result[field])
            result[name] = self._padded(torch.as_tensor(mask), 0) if field in self.fields_to_pad else mask
        for field in self.fields_to_pad:
            if field in result:
                fill = IGNORED if field == "labels" else self.tokenizer.pad_token_id
                if not result[field].dim():
                    raise ReftError(
                        f"Row {id}: {field}: expected a value for each token, got one for the row; leave it as it is "
                        f"with fields_to_pad={[name for name in self.fields_to_pad if name != field]}."
                    )
                result[field] = self._padded(result[field], fill)
        shift = 1 if self.pad_mode == "first" else 0
        result["intervention_locations"] = [[at + shift for at in row] for row in places]
        result["id"] = id
        if "subspaces" in data_item:
            result["subspaces"] = [data_item["subspaces"]] * kwargs["num_interventions"]
        return result

    # -- a sequence of items --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return copy.deepcopy(self.result[i])

    def _item(self, row: int, data_item: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.row = row
        try:
            result, last_position = self.tokenize(data_item)
        except KeyError as error:
            name = error.args[0]
            if not isinstance(data_item, Mapping) or name in data_item:
                raise
            raise ReftError(f"Row {row}: expected a field {name!r}, there are {', '.join(data_item)}.") from error
        return self.compute_intervention_and_subspaces(row, data_item, result, last_position, **kwargs)

    def _check(self, row: int, result: dict[str, Any]) -> None:
        labels = result.get("labels")
        if isinstance(labels, Tensor) and labels.dim() and bool((labels == IGNORED).all()):
            raise ReftError(
                f"Row {row}: all of its {len(labels)} labels are {IGNORED}, there is nothing to learn; does the prompt "
                f"fill tokenizer.model_max_length = {self.tokenizer.model_max_length}?"
            )
        for field in self.fields_to_mask:
            if not self._doubled_bos:
                self._doubled_bos = told_of_doubled_bos(self.tokenizer, result[field][:2].tolist(), row)

    def _text_mask(self, ids: Tensor) -> Tensor:
        """Zero for the padding that a row ends with. An EOS token that is also the padding token closes the text."""
        text = (ids != self.tokenizer.pad_token_id).nonzero()
        end = int(text[-1]) + 1 if len(text) else 0
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            end += 1
        return (torch.arange(len(ids)) < end).int()

    def _padded(self, row: Tensor, fill: int) -> Tensor:
        extra = row.new_full((1,), fill)
        if self.pad_mode == "first":
            return torch.cat((extra, row))
        return torch.cat((row, extra)) if self.pad_mode == "last" else row


def _load(task: str, data_path: str | None, split: str) -> Any:
    if data_path is not None and Path(data_path).suffix in (".json", ".jsonl"):
        if not Path(data_path).is_file():
            raise ReftError(f"{data_path}: there is no such file; expected JSON, a list of rows or one row a line.")
        return datasets.load_dataset("json", data_files=data_path, split="train")
    return datasets.load_dataset(task, *([] if data_path is None else [data_path]), split=split)


class ReftRawDataset(ReftDataset):
    """Rows with `instruction` and `output`, which is learned as it stands; edited in the instruction.

    A split other than `"train"` has no answers: its items are prompts. With `no_stop` no EOS token is added. The
    columns are attributes, too, such as `input_ids` and `intervention_locations`; `labels` and `subspaces` are none
    where the rows have none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("input_ids", "attention_mask", "intervention_locations", "labels", "subspaces", "id"):
            column = [item[name] for item in self.result if name in item]
            setattr(self, name, column if len(column) == len(self.result) else None)

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.no_stop: bool = kwargs.get("no_stop", False)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        prompt = data_item["instruction"]
        if self.data_split != "train":
            ids = truncated_ids(self.tokenizer, prompt)
            return {"input_ids": ids}, len(ids)
        return tokenize_pair(self, prompt, data_item["output"], end=not self.no_stop)


def tokenize_pair(dataset: ReftDataset, prompt: str, answer: str, *, end: bool) -> tuple[dict[str, Any], int]:
    """Return the token ids of a prompt and its answer with labels on the answer, and the prompt's length."""
    ids, length = encode_pair(dataset.tokenizer, prompt, answer, end=end, number=dataset.row)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORED] * length + ids[length:])}, length


def truncated_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The token ids of a text, cut at the tokenizer's `model_max_length`."""
    return torch.tensor(tokenizer(text, truncation=True, max_length=tokenizer.model_max_length)["input_ids"])
