"""Which directions an adapter writes into the residual stream, and the tokens nearest to them by the unembedding.

The rows of R are no answer: R and W can be rotated together without changing the edit, most formulas have no R, and
what a row holds may hardly be written. So the directions are those of the edits themselves: the right singular vectors
of all edits h' - h of a place on given rows, the strongest first. That is the same for every formula.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.encode import token_texts
from ..errors import ReftError
from ..places.structure import find_blocks, hidden_width, widths_of
from .recorded import Place, PlaceEdits, RecordedEdits

# the components whose states are the residual stream, or are added to it as they are
_RESIDUAL = ("block_input", "block_output", "mlp_output", "down_output", "attention_output", "cross_attention_output")
_CHUNK = 16384  # rows of the unembedding that are looked at together

Near = list[tuple[str, float]]


@dataclass(frozen=True)
class Direction:
    """One direction that a place writes.

    Args:
        share: of the sum of ‖h' - h‖² over the edited tokens, what lies along it.
        vector: of length 1; its sign is that of the mean edit along it.
        towards: the nearest tokens, each with its cosine to the direction.
        away: the nearest ones to the opposite direction. Both are empty where the place does not write into the
            residual stream.
    """

    share: float
    vector: Tensor
    towards: Near
    away: Near


@dataclass(frozen=True)
class WrittenDirections:
    """The strongest directions of a place.

    Args:
        place: where.
        rank: how many directions carry 99 % of ‖h' - h‖².
        directions: the strongest, none if no edit differs from 0.
    """

    place: Place
    rank: int
    directions: list[Direction]


def singular_directions(edit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of edits `[n, width]`, the strongest first, as `[k, width]`, and their shares `[k]`.

    The share of a direction is the part of the sum of ‖h' - h‖² that lies along it. Directions of no length are left
    out.
    """
    _, values, vectors = torch.linalg.svd(edit.float(), full_matrices=False)
    kept = values > values.max() * 1e-5 if len(values) else values.bool()
    values, vectors = values[kept], vectors[kept]
    along = (edit.float() @ vectors.T).mean(0)
    squares = values.double() ** 2
    return vectors * torch.where(along < 0, -1.0, 1.0)[:, None], (squares / squares.sum()).float()


def rank_of(shares: Tensor, energy: float = 0.99) -> int:
    """How many of the strongest directions carry this part of the squared length."""
    return min(int((shares.cumsum(0) < energy).sum()) + 1, len(shares))


def written_directions(
    model: Any, tokenizer: PreTrainedTokenizerBase, recorded: RecordedEdits, *, count: int = 3, near: int = 8
) -> list[WrittenDirections]:
    """Return the directions that each place writes on the recorded rows, with the nearest tokens.

    An edit of what a projection back into the residual stream takes, such as that of single heads, is read behind
    the projection. Nearness is the cosine to the rows of the unembedding, behind the model's last norm.

    Args:
        model: the one that was recorded.
        tokenizer: of it.
        count: how many directions of a place.
        near: how many tokens of a direction.

    Raises:
        ReftError: a model without an unembedding of the width of its states.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    unembedding = Unembedding(base)
    found = []
    with torch.no_grad():
        for edits in recorded.places:
            into = residual_edit(base, edits)
            vectors, shares = singular_directions(edits.edit if into is None else into)
            cosines = unembedding.cosines(vectors[:count], len(tokenizer)) if into is not None else None
            directions = [
                Direction(
                    float(shares[i]),
                    vectors[i],
                    [] if cosines is None else _near(tokenizer, cosines[i], near, 1),
                    [] if cosines is None else _near(tokenizer, cosines[i], near, -1),
                )
                for i in range(len(vectors[:count]))
            ]
            found.append(WrittenDirections(edits.place, rank_of(shares), directions))
    return found


def residual_edit(base: Any, edits: PlaceEdits) -> Tensor | None:
    """Return what edits write into the residual stream, `[n, hidden]`; none where it is no linear map of them."""
    place, module = edits.place, base.get_submodule(edits.place.path)
    if place.component.rpartition(".")[2] in _RESIDUAL:
        return edits.edit
    widths = widths_of(module)
    if place.side != "input" or widths is None or widths[1] != hidden_width(base):
        return None
    states = edits.edit
    if place.columns is not None:
        states = place.columns.put(torch.zeros(len(states), widths[0]), states)
    states = states.to(next(module.parameters()).device, base.dtype)  # weights may be packed integers
    return (module.forward(states) - module.forward(torch.zeros_like(states))).float().cpu()


class Unembedding:
    """How directions of the residual stream relate to tokens.

    Args:
        model: a language model.

    Raises:
        ReftError: a model without an unembedding, or with one that is not as wide as its states.
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if layer is None or getattr(layer, "weight", None) is None:
            raise ReftError(
                f"{type(model).__name__} has no unembedding, so no tokens are near to a direction; load it as a "
                "language model, such as with AutoModelForCausalLM. Sizes and comparisons need none."
            )
        path, _ = find_blocks(model)
        parent = model.get_submodule(path.rpartition(".")[0])
        norms = [child for name, child in parent.named_children() if re.search(r"norm|ln_", name.lower())]
        self.norm: Any = norms[-1] if norms else nn.Identity()
        self.weight: Tensor = layer.weight
        width = hidden_width(model)
        if self.weight.shape[-1] != width:
            raise ReftError(
                f"{type(model).__name__}: the unembedding takes {self.weight.shape[-1]} numbers, the states have "
                f"{width}; something between them is not known here."
            )

    def cosines(self, vectors: Tensor, tokens: int) -> Tensor:
        """Return the cosine of each direction `[k, hidden]` to each of the first tokens, `[k, tokens]`.

        The norm is applied as it stands, less what it makes of 0, which leaves its scale and the mean it removes.
        """
        parameter = next(self.norm.parameters(), self.weight)
        states = (vectors * vectors.shape[-1] ** 0.5).to(parameter.device, parameter.dtype)
        read = nn.functional.normalize((self.norm(states) - self.norm(torch.zeros_like(states))).float(), dim=-1)
        read = read.to(self.weight.device)
        parts = [nn.functional.normalize(part.float(), dim=-1) for part in self.weight[:tokens].split(_CHUNK)]
        return torch.cat([(read @ part.T).cpu() for part in parts], dim=-1)


def _near(tokenizer: Any, cosines: Tensor, count: int, sign: int) -> Near:
    """The tokens with the largest cosine, or with the largest one to the opposite direction."""
    values, ids = (sign * cosines).topk(min(count, len(cosines)))
    return list(zip(token_texts(tokenizer, ids.tolist()), values.tolist(), strict=True))


def first_tokens(near: Sequence[tuple[str, float]], count: int) -> str:
    """The first of the nearest tokens in one line."""
    return " ".join(text.strip() or repr(text) for text, _ in near[:count])
