"""What is tried: formulas, places, layers, tokens, rank, dropout, learning rate, epochs, for one model and its data.

A point of the space is plain data under the names of `Space.NAMES`. Which points are tried, and how, is not known here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..errors import ReftError
from ..interventions import intervention_class, setting_names
from ..jobs.methods import learning_rate, make_config
from ..jobs.settings import TrainingJob
from ..places.components import number_of_layers
from ..places.structure import hidden_width
from ..positions import IGNORED, Positions
from ..tuner.injection import make_interventions
from ..tuner.representation import default_rank

Point = dict[str, Any]
Sizes = dict[tuple[str, str], tuple[int, int]]  # of an edit in a choice of layers, beside and for each rank
_EDITS = (
    ("loreft", "block_output"),
    ("nodireft", "block_output"),
    ("lora", "value_output,attention_output"),
    ("lora", "query_output,value_output"),
    ("lora", "attention_output,mlp_output"),
)
_POSITIONS = ("l1", "l4", "l16", "l64", "f7+l7", "prompt")
_RANKS = 1, 32
_DROPOUTS = 0.0, 0.3
_LRS = 2e-4, 5e-2
_STEPS = 50, 800  # of the shortest and the longest training, as far as whole epochs give them
_EPOCHS = 3  # that the longest one has at least
# what the study of the embedded model found best: see benchmarks/RESULTS.md
_KNOWN = {
    **{"edit": "lora at value_output,attention_output", "layers": "all", "positions": "l16"},
    **{"rank": 4, "dropout": 0.3},  # at the learning rate that suits the base model
}


@dataclass(frozen=True)
class Space:
    """The points that may be tried.

    Args:
        edits: by name, the settings `intervention` and `component` of each.
        layers: by name, the setting `layers` of each.
        positions: the rules.
        dropout: the shares.
        rank, lr, epochs: the least and the most.
        starts: points to begin with; the first one is what nobody has tuned.
        sizes: of each edit in each choice of layers: parameters beside those of the rank, and for each rank.
        most: how many parameters a point may have; none for any number.
    """

    NAMES: ClassVar = ("edit", "layers", "positions", "dropout", "rank", "lr", "epochs")

    edits: dict[str, dict[str, str]]
    layers: dict[str, str]
    positions: tuple[str, ...]
    dropout: tuple[float, ...]
    rank: tuple[int, int]
    lr: tuple[float, float]
    epochs: tuple[float, float]
    starts: tuple[Point, ...]
    sizes: Sizes
    most: int | None

    def settings(self, point: Point) -> dict[str, Any]:
        """The settings of a training that a point stands for."""
        edit = self.edits[point["edit"]]
        names = "positions", "dropout", "lr", "epochs", *(["rank"] if _takes_rank(edit) else [])
        plain = {name: point[name] for name in names}
        return {**edit, "layers": self.layers[point["layers"]], **plain}

    def count(self, point: Point) -> int:
        """How many parameters a point has."""
        beside, each = self.sizes[point["edit"], point["layers"]]
        return beside + each * point["rank"]

    def ranks(self, edit: str, layers: str) -> tuple[int, int] | None:
        """The least and the highest rank of an edit in some layers; none if it has too many parameters at any."""
        if (edit, layers) not in self.sizes:
            return None
        (beside, each), (least, highest) = self.sizes[edit, layers], self.rank
        return least, min(highest, (self.most - beside) // each) if self.most is not None and each else highest

    def to_params(self, point: Point) -> dict[str, Any]:
        """A point with its rank as a share, from 0 to 1 on a logarithmic scale, of what fits; see `to_point`."""
        least, highest = self.ranks(point["edit"], point["layers"]) or self.rank
        share = math.log(point["rank"] / least) / math.log(highest / least) if highest > least else 0.0
        return point | {"rank": share}

    def to_point(self, params: Mapping[str, Any]) -> Point | None:
        """The point that `to_params` gives this of; none where the edit in these layers has too many parameters."""
        ranks = self.ranks(params["edit"], params["layers"])
        if ranks is None:
            return None
        least, highest = ranks
        return {**params, "rank": round(least * (highest / least) ** params["rank"])}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that tells spaces apart."""
        ranges = {name: getattr(self, name) for name in self.NAMES if name != "edit"}
        return {"edits": list(self.edits), **ranges, "parameters": self.most}


def find_space(
    model: nn.Module,
    job: TrainingJob,
    rows: Sequence[dict[str, Any]],
    *,
    given: Iterable[str] = (),
    most: int | None = None,
) -> Space:
    """Return the space of a base model and of rows to train it on.

    Args:
        model: the base model.
        job: with the settings that nobody has tuned.
        rows: of the training.
        given: the settings of the job that are to stay as they are.
        most: how many parameters an edit may have.

    Raises:
        ReftError: nothing has so few parameters, or a setting that does not fit the model.
    """
    kept, lr = set(given), learning_rate(job, model)
    job = replace(job, lr=lr)
    steps = math.ceil(len(rows) / (job.batch_size * job.gradient_accumulation))
    edits = _edits(job, kept)
    layers = {job.layers: job.layers} if "layers" in kept else _layers(number_of_layers(model))
    rank = (own := _rank(job), own)
    if "rank" not in kept and any(_takes_rank(settings) for settings in edits.values()):
        rank = _RANKS[0], min(_RANKS[1], hidden_width(model))
    sizes = {key: size for edit in edits for key, size in _sizes(model, edit, edits[edit], job, layers).items()}
    if most is not None:
        sizes, rank = _within(sizes, rank, most)
    space = Space(
        edits={name: edits[name] for name in edits if any(name == edit for edit, _ in sizes)},
        layers={name: layers[name] for name in layers if any(name == own for _, own in sizes)},
        positions=(job.positions,) if "positions" in kept else _positions(rows, job.positions),
        dropout=tuple(dict.fromkeys((job.edit_dropout, *(() if "dropout" in kept else _DROPOUTS)))),
        rank=rank,
        lr=(lr, lr) if "lr" in kept else (min(_LRS[0], lr), max(_LRS[1], lr)),
        epochs=(_whole(job.epochs), _whole(job.epochs)) if "epochs" in kept else _epochs(steps, job.epochs),
        starts=(),
        sizes=sizes,
        most=most,
    )
    return replace(space, starts=_starts(space, job, kept))


def _starts(space: Space, job: TrainingJob, kept: set[str]) -> tuple[Point, ...]:
    """What nobody has tuned, and what was found to do well elsewhere, each with as many parameters as it may have."""
    default = {"positions": job.positions, "dropout": job.edit_dropout, "rank": _rank(job), "lr": job.lr}
    default |= {"epochs": _whole(job.epochs), "edit": next(iter(space.edits)), "layers": next(iter(space.layers))}
    middle = _whole(round(math.sqrt(math.prod(space.epochs))))
    known = default | {name: value for name, value in (_KNOWN | {"epochs": middle}).items() if name not in kept}
    if known["positions"] not in space.positions:
        known["positions"] = space.positions[-1]
    found = [_smaller(default, space)]
    if known["edit"] in space.edits and known["layers"] in space.layers:
        found.append(_smaller(known, space))
    return tuple({repr(point): point for point in found}.values())


def _smaller(point: Point, space: Space) -> Point:
    """A point, or where it has too many parameters the one most like it: of lower rank, else in fewer layers."""
    edit = point["edit"]
    fitting = [layers for layers in space.layers if space.ranks(edit, layers)]
    layers = point["layers"] if point["layers"] in fitting else fitting[0]
    least, highest = space.ranks(edit, layers) or space.rank
    return point | {"layers": layers, "rank": max(least, min(point["rank"], highest))}


def _within(sizes: Sizes, rank: tuple[int, int], most: int) -> tuple[Sizes, tuple[int, int]]:
    """Those that fit at the lowest rank, and the ranks at which any of them does."""
    least = {key: beside + each * rank[0] for key, (beside, each) in sizes.items()}
    fitting = {key: sizes[key] for key in sizes if least[key] <= most}
    if not fitting:
        raise ReftError(
            f"no edit that could be tried has so few parameters: got {most:,}, the smallest has "
            f"{min(least.values()):,}.",
            setting="parameters",
        )
    highest = max((most - beside) // each if each else rank[1] for beside, each in fitting.values())
    return fitting, (rank[0], min(rank[1], highest))


def _edits(job: TrainingJob, kept: set[str]) -> dict[str, dict[str, str]]:
    """By name; the first is the job's own."""
    own = job.component or make_config(job).component
    default = str(job.formula), own if isinstance(own, str) else ",".join(own)
    asked = [place for name, place in (("intervention", 0), ("component", 1)) if name in kept]
    pairs = [p for p in dict.fromkeys((default, *_EDITS)) if all(p[place] == default[place] for place in asked)]
    return {f"{formula} at {place}": {"intervention": formula, "component": place} for formula, place in pairs}


def _layers(count: int) -> dict[str, str]:
    """By name, of so many; the first is all of them."""
    ranges = {
        "all": range(count),
        "lower half": range(math.ceil(count / 2)),
        "upper half": range(count // 2, count),
        "middle third": range(count // 3, math.ceil(2 * count / 3)),
        "every other": range(0, count, 2),
        "one": range(count // 2, count // 2 + 1),
    }
    found: dict[str, str] = {}
    for name, numbers in ranges.items():
        text = ";".join(map(str, numbers))
        if text not in found.values():
            found[name] = text
    return found | {"all": "all"}


def _positions(rows: Sequence[dict[str, Any]], default: str) -> tuple[str, ...]:
    """The rules that differ on prompts as long as these; the first is the default."""
    longest = max(_prompt_length(row["labels"]) for row in rows)
    others = []
    for name in _POSITIONS:
        rule = Positions.parse(name)
        if rule.whole or rule.first + rule.last < longest:
            others.append(name)
    return tuple(dict.fromkeys((default, *others)))


def _prompt_length(labels: Sequence[int]) -> int:
    return next((number for number, label in enumerate(labels) if label != IGNORED), len(labels))


def _epochs(steps: int, default: float) -> tuple[float, float]:
    """The least and the most, where each has so many steps."""
    least, most = (max(1, round(wanted / steps)) for wanted in _STEPS)
    return _whole(min(least, default)), _whole(max(most, _EPOCHS, default))


def _whole(number: float) -> float:
    """A number as one without a point, where it is whole."""
    return int(number) if number == int(number) else number


def _rank(job: TrainingJob) -> int:
    """The rank of a job's edits, also where their formula has none and nobody asks."""
    return default_rank(intervention_class(job.formula or "")) if job.rank is None else job.rank


def _takes_rank(settings: Mapping[str, str]) -> bool:
    return "low_rank_dimension" in setting_names(intervention_class(settings["intervention"]))[0]


def _sizes(
    model: nn.Module, edit: str, settings: Mapping[str, Any], job: TrainingJob, layers: Mapping[str, str]
) -> Sizes:
    """The sizes of an edit in each choice of layers; nothing if it does not fit the model.

    Raises:
        ReftError: the edit is the job's own, and does not fit.
    """
    whole = next(iter(layers.values()))  # which has all that are in the others
    ranks = (1, 2) if _takes_rank(settings) else (None, None)
    try:
        one, two = (_by_layer(model, TrainingJob(layers=whole, rank=rank, **settings)) for rank in ranks)
    except ReftError:
        if settings["intervention"] == job.formula:
            raise
        return {}
    found: Sizes = {}
    for name, numbers in layers.items():
        chosen = one if numbers == whole else [int(number) for number in numbers.split(";")]
        each = sum(two[layer] - one[layer] for layer in chosen)
        found[edit, name] = sum(one[layer] for layer in chosen) - each, each  # which is 0 where there is no rank
    return found


def _by_layer(model: nn.Module, job: TrainingJob) -> dict[Any, int]:
    """How many parameters the edits of a job have in each layer."""
    config: Any = make_config(job)
    places, _, by_path = make_interventions(model, config)
    found: dict[Any, int] = {}
    for _, index, made in (edit for group in by_path.values() for edit in group):
        layer = places[index].layer
        found[layer] = found.get(layer, 0) + sum(parameter.numel() for parameter in made.parameters())
    return found
