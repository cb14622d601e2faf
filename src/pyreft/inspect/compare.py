"""How alike two adapters are: the subspaces they write in, and their edits of the same tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ReftError
from .directions import rank_of, singular_directions
from .recorded import Place, RecordedEdits


@dataclass(frozen=True)
class PlaceComparison:
    """Two adapters at a place that both edit.

    Args:
        place: the first adapter's.
        ranks: how many directions each of them writes in (those that carry 99 % of ‖h' - h‖²).
        cosines: of the principal angles between the two subspaces, the largest first, `[smaller rank]`.
        overlap: the mean of their squares: 1 where one subspace contains the other, 0 where they are orthogonal.
        chance: what two random subspaces of these ranks have on average.
        cosine: of the two edits of a token, the mean over the tokens that both edit; none if there are no such tokens.
        tokens: how many these are.
    """

    place: Place
    ranks: tuple[int, int]
    cosines: Tensor
    overlap: float
    chance: float
    cosine: float | None
    tokens: int

    @property
    def angles(self) -> Tensor:
        """The principal angles in degrees, the smallest first."""
        return torch.rad2deg(torch.acos(self.cosines.clamp(-1, 1)))


@dataclass(frozen=True)
class Comparison:
    """Two adapters at all places.

    Args:
        places: those that both edit.
        only_first, only_second: those that one of them edits.
    """

    places: list[PlaceComparison]
    only_first: list[Place]
    only_second: list[Place]


def compare_edits(first: RecordedEdits, second: RecordedEdits) -> Comparison:
    """Compare what two adapters did on the same rows, each active alone.

    At each place, the subspace of an adapter is spanned by the directions of its edits on these rows (see
    `singular_directions`), as many as carry 99 % of their squared length. Several interventions of an adapter at one
    place count as one.

    Raises:
        ReftError: two records of different rows.
    """
    if [row["input_ids"] for row in first.rows] != [row["input_ids"] for row in second.rows]:
        raise ReftError("compare_edits: expected two records of the same rows; record both adapters on them.")
    ours, theirs = _by_site(first), _by_site(second)
    pairs = [(ours[site], theirs[site]) for site in ours if site in theirs]
    return Comparison(
        [_compare(one, other) for one, other in pairs],
        [entry[0] for site, entry in ours.items() if site not in theirs],
        [entry[0] for site, entry in theirs.items() if site not in ours],
    )


_Edits = tuple[Place, Tensor, Tensor]  # a place, the edited tokens as `[n, 2]` of row and token, and their edits


def _by_site(recorded: RecordedEdits) -> dict[tuple, _Edits]:
    """The edits of an adapter by the states they change; those of the same token are summed."""
    found: dict[tuple, _Edits] = {}
    for edits in recorded.places:
        at, edit = torch.stack((edits.rows, edits.tokens), dim=-1), edits.edit
        if (known := found.get(edits.place.site)) is not None:
            at, edit = torch.cat((known[1], at)), torch.cat((known[2], edit))
        at, where = at.unique(dim=0, return_inverse=True)
        summed = edit.new_zeros(len(at), edit.shape[-1]).index_add(0, where, edit)
        found[edits.place.site] = edits.place if known is None else known[0], at, summed
    return found


def _compare(first: _Edits, second: _Edits) -> PlaceComparison:
    bases = []
    for _, _, edit in (first, second):
        vectors, shares = singular_directions(edit)
        bases.append(vectors[: rank_of(shares)])
    ranks = len(bases[0]), len(bases[1])
    cosines = torch.linalg.svdvals(bases[0] @ bases[1].T) if min(ranks) else torch.zeros(0)
    both = (first[1][:, None] == second[1][None]).all(-1).nonzero()  # pairs of the same row and token
    alike = nn.functional.cosine_similarity(first[2][both[:, 0]], second[2][both[:, 1]], dim=-1)
    return PlaceComparison(
        first[0],
        ranks,
        cosines,
        float((cosines**2).mean()) if min(ranks) else 0.0,
        max(ranks) / first[2].shape[-1],
        float(alike.mean()) if len(both) else None,
        len(both),
    )
