"""How answers are scored: the metrics of the paper's tables, in plain code. They know numbers, nothing of tasks.

Each takes the predictions and the truth, one for one, and returns a share: 1 is perfect. Where a metric is not defined,
as a correlation of predictions that are all the same, it is 0.
"""

import math
from collections.abc import Callable, Sequence

Metric = Callable[[Sequence[float], Sequence[float]], float]


def accuracy(found: Sequence[float], truth: Sequence[float]) -> float:
    """The share of equal ones.

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    return sum(f == t for f, t in zip(found, truth, strict=True)) / len(truth)


def f1(found: Sequence[float], truth: Sequence[float]) -> float:
    """The harmonic mean of precision and recall of the class 1.

    >>> f1([1, 1, 0, 0], [1, 0, 1, 0])
    0.5
    """
    true, false, missed, _ = _counts(found, truth)
    return 2 * true / (2 * true + false + missed) if true else 0.0


def matthews(found: Sequence[float], truth: Sequence[float]) -> float:
    """Matthews' correlation of two classes, 0 and 1.

    >>> matthews([1, 1, 0, 0], [1, 0, 1, 0])
    0.0
    """
    true, false, missed, rejected = _counts(found, truth)
    product = (true + false) * (true + missed) * (rejected + false) * (rejected + missed)
    return (true * rejected - false * missed) / math.sqrt(product) if product else 0.0


def pearson(found: Sequence[float], truth: Sequence[float]) -> float:
    """The linear correlation.

    >>> round(pearson([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    count = len(truth)
    a = [f - sum(found) / count for f in found]
    b = [t - sum(truth) / count for t in truth]
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def spearman(found: Sequence[float], truth: Sequence[float]) -> float:
    """The linear correlation of the ranks; equal values share the mean of their ranks.

    >>> round(spearman([1, 2, 3], [1, 4, 9]), 6)
    1.0
    """
    return pearson(_ranks(found), _ranks(truth))


METRICS: dict[str, Metric] = {m.__name__: m for m in (accuracy, f1, matthews, pearson, spearman)}


def _counts(found: Sequence[float], truth: Sequence[float]) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    pairs = [(f == 1, t == 1) for f, t in zip(found, truth, strict=True)]
    return (
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda at: values[at])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for at in order[start : end + 1]:
            ranks[at] = (start + end) / 2
        start = end + 1
    return ranks
