"""What came of one training of a study, and which of several are the best for their cost. It trains nothing."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

DONE, PRUNED, RUNNING, STOPPED, DIVERGED = "done", "pruned", "running", "stopped", "diverged"
REFUSED = "refused"  # a point with too many parameters, which is not trained
Cost = Literal["parameters", "seconds"]


@dataclass
class Record:
    """One training.

    Args:
        number: of the trial, which names its directory.
        state: `done`; `pruned`, as its held-out loss was worse than most at that step; `diverged`; `running`; or
            `stopped`, where the point is tried again by a later trial.
        settings: of the training, as `TrainingJob` has them, which were searched.
        point: of the space.
        default: whether it is what nobody has tuned.
        parameters: how many it trains.
        steps: how many it has.
        seconds: that they took, without scoring.
        loss: of a labelled held-out token.
        exact: the share of held-out answers that are exactly right, if that was the score.
        value: what is to be small: the loss; or the share of wrong answers, of equal ones the lower loss.
        curve: the held-out losses on the way, by step.
    """

    number: int
    settings: dict[str, Any]
    point: dict[str, Any]
    default: bool
    parameters: int
    steps: int = 0
    state: str = RUNNING
    seconds: float | None = None
    loss: float | None = None
    exact: float | None = None
    value: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """In a few words, such as `lora r4 at value_output,attention_output, all layers, l16`."""
        own = self.settings
        layers = f"layer {own['layers']}" if str(own["layers"]).isdigit() else f"layers {own['layers']}"
        where = "all layers" if own["layers"] == "all" else layers
        dropout = f", dropout {own['dropout']:g}" if own.get("dropout") else ""
        return f"{own['intervention']} r{own['rank']} at {own['component']}, {where}, {own['positions']}{dropout}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """From plain data."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def value_of(loss: float, exact: float | None, count: int) -> float:
    """What is to be small; two shares of `count` answers differ by more than any two losses can make up for."""
    return loss if exact is None else 1 - exact + loss / (1 + loss) / (2 * count)


def best_of(records: Iterable[Record]) -> Record | None:
    """The one that is to be taken, of equals the earlier; none if none is done."""
    done = [record for record in records if record.state == DONE and record.value is not None]
    return min(done, key=lambda record: (record.value, record.number), default=None)


def frontier(records: Iterable[Record], cost: Cost) -> list[Record]:
    """Those that are done and that no cheaper one is as good as, cheapest first."""
    done = [record for record in records if record.state == DONE and record.value is not None]
    found: list[Record] = []
    for record in sorted(done, key=lambda record: (getattr(record, cost), record.value, record.number)):
        if not found or record.value < found[-1].value:  # type: ignore[operator]
            found.append(record)
    return found
