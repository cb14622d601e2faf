"""The weights of many adapters side by side on the device: a slot for each, and the edit of tokens by slot.

Knows nothing of files, rules or engines: `tokens` says which of a step's tokens, `affine` what a slot's weights mean.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from ..errors import ReftError
from .affine import Edit, LowRank, Vectors, activation
from .tokens import Place, Step, Tile, by_layer, by_part

Edits = Mapping[Place, Edit]


class Slots:
    """Which adapter is in which slot. The least recently used one leaves; one in use never does."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.of: OrderedDict[Hashable, int] = OrderedDict()  # the most recently used last
        self._users: Counter[Hashable] = Counter()
        self._free = list(range(count))[::-1]

    def take(self, adapter: Hashable, load: Callable[[int], None]) -> int:
        """Return the slot of an adapter for one more request, after `load(slot)` if it was in none.

        Raises:
            ReftError: every slot is in use.
        """
        if adapter not in self.of:
            if not self._free:
                self.drop(self._idle())
            slot = self._free[-1]
            load(slot)
            self._free.pop()
            self.of[adapter] = slot
        self.of.move_to_end(adapter)
        self._users[adapter] += 1
        return self.of[adapter]

    def release(self, adapter: Hashable) -> None:
        """A request with this adapter has left."""
        self._users[adapter] -= 1
        if self._users[adapter] <= 0:
            del self._users[adapter]

    def has_room(self, adapter: Hashable) -> bool:
        """Whether `take` finds a slot for one more request with this adapter."""
        return adapter in self.of or len(self._users) < self.count

    def in_use(self, adapter: Hashable) -> bool:
        """Whether a request has this adapter."""
        return adapter in self._users

    def drop(self, adapter: Hashable) -> None:
        """Free the slot of an adapter that no request has."""
        if self.in_use(adapter):
            raise ReftError(f"The adapter {adapter} is in use and keeps its slot until its requests have ended.")
        self._free.append(self.of.pop(adapter))

    def _idle(self) -> Hashable:
        for adapter in self.of:
            if not self.in_use(adapter):
                return adapter
        raise ReftError(f"All {self.count} slots are in use; the engine must let further adapters wait.")


class _LowRankLane:
    """A, b and B of all slots at one place, ranks below that of the slots filled up with zeros."""

    def __init__(self, slots: int, rank: int, read: int, width: int, device: torch.device) -> None:
        self.a = torch.zeros(slots, rank, read, device=device)
        self.b = torch.zeros(slots, 1, rank, device=device)
        self.out = torch.zeros(slots, rank, width, device=device)
        self.acts: dict[str, Tensor] = {}  # by activation, which coordinates of which slots have it

    def write(self, slot: int, edit: LowRank | None) -> None:
        for tensor in (self.a, self.b, self.out, *self.acts.values()):
            tensor[slot].zero_()
        if edit is None:
            return
        rank = len(edit.a)
        self.a[slot, :rank], self.b[slot, 0, :rank], self.out[slot, :rank] = edit.a, edit.b, edit.out
        if edit.act is not None:
            if edit.act not in self.acts:
                self.acts[edit.act] = torch.zeros_like(self.b, dtype=torch.bool)
            self.acts[edit.act][slot, 0, : edit.acted] = True

    def widths(self) -> tuple[int, int]:
        """Of what is read, and of what is edited."""
        return self.a.shape[-1], self.out.shape[-1]

    def delta(self, slots: Tensor | slice, h: Tensor) -> Tensor:
        c = torch.baddbmm(self.b[slots], h, self.a[slots].mT)
        for name, where in self.acts.items():
            c = torch.where(where[slots], activation(name)(c), c)
        return torch.bmm(c, self.out[slots])


class _VectorLane:
    """s, t and c of all slots at one place."""

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        self.parts = {name: torch.zeros(slots, 1, width, device=device) for name in ("scale", "turn", "shift")}
        self.turned: set[int] = set()

    def write(self, slot: int, edit: Vectors | None) -> None:
        self.turned.discard(slot)
        for name, tensor in self.parts.items():
            part = None if edit is None else getattr(edit, name)
            tensor[slot, 0] = 0 if part is None else part
        if edit is not None and edit.turn is not None:
            self.turned.add(slot)

    def delta(self, slots: Tensor | slice, h: Tensor) -> Tensor:
        made = torch.addcmul(self.parts["shift"][slots], h, self.parts["scale"][slots])
        if self.turned:
            made.addcmul_(h.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), self.parts["turn"][slots])
        return made


class Bank:
    """The weights of the adapters in all slots, float32.

    Args:
        slots: how many adapters it holds.
        rank: the greatest number of coordinates that an edit may have, see `affine.rank_of`.
        width: d, of the states.
        device: where it is.
    """

    def __init__(self, *, slots: int, rank: int, width: int, device: torch.device | str = "cpu") -> None:
        self.slots, self.rank, self.width, self.device = slots, rank, width, torch.device(device)
        self._low: dict[Place, _LowRankLane] = {}
        self._vectors: dict[Place, _VectorLane] = {}
        self.behind: dict[int, list[Place]] = {}  # the edited places by block
        self.inside: dict[tuple[int, str], list[Place]] = {}  # and those inside of blocks, by block and part
        self._step: Step | None = None

    def bytes(self) -> int:
        """How much memory the weights take."""
        low = [tensor for lane in self._low.values() for tensor in (lane.a, lane.b, lane.out, *lane.acts.values())]
        vectors = [tensor for lane in self._vectors.values() for tensor in lane.parts.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*low, *vectors))

    @torch.inference_mode()
    def write(self, slot: int, edits: Edits) -> None:
        """Put an adapter's edits into a slot; what was in it is gone.

        Raises:
            ReftError: a rank above that of the slots, or another width; the slot is as it was.
        """
        for place, edit in edits.items():
            found = _widths(edit)
            lane = self._low.get(place)
            widths = lane.widths() if lane is not None else found if place.part else (self.width, self.width)
            if found != widths:
                where = f"of {place.part} in" if place.part else "behind"
                raise ReftError(f"An edit {where} block {place.layer} is {found[1]} wide, the states are {widths[1]}.")
            if isinstance(edit, LowRank) and len(edit.a) > self.rank:
                raise ReftError(
                    f"an edit needs {len(edit.a)} coordinates, the slots have {self.rank}; start "
                    f"the engine with a rank of {len(edit.a)}.",
                    setting="low_rank_dimension",
                )
            if isinstance(edit, LowRank) and place not in self._low:
                self._low[place] = _LowRankLane(self.slots, self.rank, *found, self.device)
            if isinstance(edit, Vectors) and place not in self._vectors:
                self._vectors[place] = _VectorLane(self.slots, self.width, self.device)
        self.behind, self.inside = by_layer({*self._low, *self._vectors}), by_part(self._low)
        for place, low in self._low.items():
            own = edits.get(place)
            low.write(slot, own if isinstance(own, LowRank) else None)
        for place, vectors in self._vectors.items():
            own = edits.get(place)
            vectors.write(slot, own if isinstance(own, Vectors) else None)

    @property
    def active(self) -> bool:
        """Whether the step edits anything."""
        return self._step is not None

    def begin(self, step: Step | None, tokens: int) -> None:
        """Take what the step edits that now begins, of so many tokens."""
        self._step = step

    def edit(self, place: Place, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the states of the step's tokens in place.

        Args:
            place: where they stand.
            hidden: `[tokens, d]`, the states, or a part of them.
            residual: the other part, of the same shape, if there is one: their sum is the states. Where they are
                edited, all of the state is put into it, so that the sum is rounded no further.
        """
        if self._step is not None:
            self.edit_in(self._step, place, hidden, residual)

    def edit_in(
        self, step: Step, place: Place, hidden: Tensor, residual: Tensor | None = None, read: Tensor | None = None
    ) -> None:
        """The same for the tokens of a step that the bank need not remember.

        Args:
            read: `[tokens, k]`, what the linear layer read that wrote these states, where its edit acts on that.
        """
        for tile in step.tiles(place, hidden.device):
            at = tile.at
            h = hidden[at]  # and all that follows in place: a prompt's states are large
            if residual is not None:
                h += residual[at]
            edited = self.delta(place, tile, h if read is None else read[at]).add_(h).to(h.dtype)
            if tile.valid is not None:
                at, edited = at[tile.valid], edited[tile.valid]
            if residual is None:
                hidden[at] = edited
            else:
                residual[at] = edited
                hidden[at] = 0

    def delta(self, place: Place, tile: Tile, h: Tensor) -> Tensor:
        """Return h' - h for the states `[lines, width, d]` of a tile's tokens, float32; of LoRA for what was read."""
        h = h.float()
        low, vectors = self._low.get(place), self._vectors.get(place)
        made = None if low is None else low.delta(tile.slots, h)
        if vectors is not None:
            more = vectors.delta(tile.slots, h)
            made = more if made is None else made + more
        if made is None:
            return torch.zeros_like(h)
        return made if tile.strength is None else made * tile.strength


def _widths(edit: Edit) -> tuple[int, int]:
    """Of what an edit reads, and of what it writes."""
    if isinstance(edit, LowRank):
        return edit.a.shape[-1], edit.out.shape[-1]
    width = next(part.shape[-1] for part in (edit.scale, edit.turn, edit.shift) if part is not None)
    return width, width
