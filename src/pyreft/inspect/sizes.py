"""How large the edits are, by place and by token: ‖h' - h‖, and the same as a share of ‖h‖."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.encode import token_texts
from ..errors import ReftError
from .examples import prompt_length
from .recorded import Place, PlaceEdits, RecordedEdits


@dataclass(frozen=True)
class EditSizes:
    """Sizes of edits, by place and by column.

    Args:
        places: the rows of the two tables.
        labels: their columns: the tokens of one text, or positions counted over several, as `f1`, the first token
            of the prompt, `l1`, its last one, and `+1`, the first one after it.
        size: ‖h' - h‖, `[places, columns]`; NaN where nothing is edited.
        relative: ‖h' - h‖ / ‖h‖, of the same shape. At a single head, h is the part of the state that the head has.
    """

    places: list[Place]
    labels: list[str]
    size: Tensor
    relative: Tensor


def edit_sizes(recorded: RecordedEdits, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> EditSizes:
    """Return the sizes of the edits of one row, with its tokens as labels.

    Raises:
        ReftError: a row that was not recorded.
    """
    if not 0 <= row < len(recorded.rows):
        raise ReftError(f"expected 0 to {len(recorded.rows) - 1}, got {row}.", setting="row")
    labels = token_texts(tokenizer, recorded.rows[row]["input_ids"])
    tables = torch.full((2, len(recorded.places), len(labels)), torch.nan)
    for number, edits in enumerate(recorded.places):
        here = edits.rows == row
        tables[:, number, edits.tokens[here]] = _norms(edits)[:, here]
    return EditSizes([edits.place for edits in recorded.places], labels, tables[0], tables[1])


def mean_edit_sizes(recorded: RecordedEdits) -> EditSizes:
    """Return the mean sizes over all rows, by position in the prompt.

    A rule of last tokens is counted from the end of the prompt, one of first tokens from its beginning, any other
    from the nearer of the two.
    """
    lengths = [prompt_length(row) for row in recorded.rows]
    sums: list[dict[tuple[int, int], list[Tensor]]] = []
    for edits in recorded.places:
        cells: dict[tuple[int, int], list[Tensor]] = {}
        for row, token, norms in zip(edits.rows.tolist(), edits.tokens.tolist(), _norms(edits).T, strict=True):
            cells.setdefault(_position(edits.place, token, lengths[row]), []).append(norms)
        sums.append(cells)
    columns = sorted({column for cells in sums for column in cells})
    tables = torch.full((2, len(sums), len(columns)), torch.nan)
    for number, cells in enumerate(sums):
        for column, norms in cells.items():
            tables[:, number, columns.index(column)] = torch.stack(norms).mean(0)
    names = [("f{}", "l{}", "+{}")[side].format(abs(count)) for side, count in columns]
    return EditSizes([edits.place for edits in recorded.places], names, tables[0], tables[1])


def _norms(edits: PlaceEdits) -> Tensor:
    """The two sizes of each edited token, `[2, n]`."""
    size, before = edits.edit.norm(dim=-1), edits.before.norm(dim=-1)
    return torch.stack((size, size / before))


def _position(place: Place, token: int, length: int) -> tuple[int, int]:
    """The side of a token (0 first, 1 last, 2 after the prompt), and its number there, so that both sort well."""
    if token >= length:
        return 2, token - length + 1
    rule = place.rule
    only_first = rule is not None and bool(rule.first) and (not rule.last or rule.side == "prefix")
    only_last = rule is not None and bool(rule.last) and (not rule.first or rule.side == "suffix")
    if only_first or (not only_last and token < length // 2):
        return 0, token + 1
    return 1, token - length
