"""What the rows of a study say: means, who is on the frontier, and which position rule is better. It trains nothing.

A row is one adapter on one task with one seed, as `training.run_cell` returns it.
"""

from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from .settings import Setting

Row = dict[str, Any]
PAPER = "f7+l7"  # the rule of the paper: others are told by their difference from it
Cost = Literal["parameters", "seconds"]


def summary(rows: Sequence[Row], baseline: str = PAPER) -> dict[str, Any]:
    """Return `means`, `frontier` and `rules` of the rows of a study, as `study.json` holds them."""
    points = means(rows)
    tasks = list(dict.fromkeys(point["task"] for point in points))
    on = {
        task: {cost: frontier([p for p in points if p["task"] == task], cost) for cost in ("parameters", "seconds")}
        for task in tasks
    }
    return {"means": points, "frontier": on, "rules": compare_rules(rows, baseline)}


def means(rows: Iterable[Row]) -> list[Row]:
    """One point for each task and adapter: the mean over seeds of the last score and of the seconds, with the spread.

    `sd` is the standard deviation of the score over seeds, and none with one seed.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["task"], row["name"]), []).append(row)
    points = []
    for group in grouped.values():
        scores = [row["curve"][-1]["score"] for row in group]
        first = {key: group[0][key] for key in ("task", "name", "method", "rank", "positions", "layers", "parameters")}
        seconds = fmean(row["curve"][-1]["seconds"] for row in group)
        points.append(first | {"lr": group[0]["lr"], "score": fmean(scores), "sd": _sd(scores), "seconds": seconds})
    return points


def frontier(points: Sequence[Row], cost: Cost) -> list[str]:
    """The names of the points that no other beats: none costs at most as much and scores at least as high, and is not
    the same in both. Cheapest first."""

    def beaten(point: Row) -> bool:
        return any(
            other[cost] <= point[cost]
            and other["score"] >= point["score"]
            and (other[cost], other["score"]) != (point[cost], point["score"])
            for other in points
        )

    return [point["name"] for point in sorted(points, key=lambda p: (p[cost], p["name"])) if not beaten(point)]


def score_at(curve: Sequence[Row], seconds: float) -> float:
    """The score after so many seconds, between two measured ones on the line through them.

    The line begins at a score of 0, which is what the base model has in the tasks of the study; behind the last
    measured score it stays as it is.
    """
    before = {"seconds": 0.0, "score": 0.0}
    for point in curve:
        if seconds < point["seconds"]:
            share = (seconds - before["seconds"]) / (point["seconds"] - before["seconds"])
            return before["score"] + share * (point["score"] - before["score"])
        before = point
    return before["score"]


def compare_rules(rows: Sequence[Row], baseline: str = PAPER) -> dict[str, Any]:
    """Compare the position rules, all else being equal: after equal steps, and after equal seconds.

    The seconds of a task are those in which the cheapest rule makes all of its steps.

    Returns:
        `tasks`: for each task the `seconds`, and for each rule its mean `score` after all steps, the `score_then`
        after the seconds of the task, and the `seconds` of all steps. `against`: the `baseline`, and for each other
        rule the mean difference `steps` and `seconds` of its scores from the baseline's, over tasks and seeds, each
        with its standard error (none of a single pair).
    """
    chosen = [row for row in rows if Setting(row["method"], row["rank"], row["positions"], row["layers"]).is_rule]
    tasks: dict[str, Any] = {}
    scores: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
    for task in dict.fromkeys(row["task"] for row in chosen):
        by_rule: dict[str, list[Row]] = {}
        for row in chosen:
            if row["task"] == task:
                by_rule.setdefault(row["positions"], []).append(row)
        spent = {rule: fmean(row["curve"][-1]["seconds"] for row in group) for rule, group in by_rule.items()}
        budget = min(spent.values())
        found = {}
        for rule, group in by_rule.items():
            pairs = [(row["curve"][-1]["score"], score_at(row["curve"], budget)) for row in group]
            for row, pair in zip(group, pairs, strict=True):
                scores.setdefault(rule, {})[task, row["seed"]] = pair
            score, then = (fmean(column) for column in zip(*pairs, strict=True))
            found[rule] = {"score": score, "score_then": then, "seconds": spent[rule]}
        tasks[task] = {"seconds": budget, "rules": found}
    return {"tasks": tasks, "against": {"baseline": baseline, **_differences(scores, baseline)}}


def _differences(scores: dict[str, dict[tuple[str, int], tuple[float, float]]], baseline: str) -> dict[str, Any]:
    known = scores.get(baseline, {})
    found = {}
    for rule, own in scores.items():
        both = [key for key in own if key in known]
        if rule != baseline and both:
            kinds = zip(("steps", "seconds"), (0, 1), strict=True)
            columns = {kind: [own[key][index] - known[key][index] for key in both] for kind, index in kinds}
            found[rule] = {kind: {"mean": fmean(column), "error": _error(column)} for kind, column in columns.items()}
    return found


def _sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _error(values: Sequence[float]) -> float | None:
    spread = _sd(values)
    return None if spread is None else spread / sqrt(len(values))
