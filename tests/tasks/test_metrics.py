"""Scores against tables made by hand: right, wrong and malformed answers of each task."""

import math

import pytest
import torch

from pyreft.jobs.classify import predictions, score
from pyreft.tasks import glue, suites
from pyreft.tasks.answers import same
from pyreft.tasks.metrics import METRICS


@pytest.mark.parametrize(
    ("metric", "found", "truth", "expected"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 3 / 4),
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 / 3),  # precision 2/3, recall 2/3
        ("f1", [1, 0, 0, 0], [1, 1, 1, 0], 1 / 2),  # precision 1, recall 1/3
        ("f1", [0, 0], [1, 1], 0),
        ("matthews", [1, 1, 0, 0], [1, 1, 0, 0], 1),
        ("matthews", [0, 0, 1, 1], [1, 1, 0, 0], -1),
        # 3 true, 1 false positive, 1 missed, 2 rejected: (3*2 - 1*1) / sqrt(4 * 4 * 3 * 3)
        ("matthews", [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0], 5 / 12),
        ("matthews", [1, 1, 1], [1, 0, 1], 0),  # one class only: not defined
        ("pearson", [1, 2, 3], [3, 2, 1], -1),
        # deviations -1, 0, 1 and -2/3, 1/3, 1/3: 1 / sqrt(2 * 2/3)
        ("pearson", [1, 2, 3], [1, 2, 2], math.sqrt(3) / 2),
        ("pearson", [2, 2, 2], [1, 2, 3], 0),
        ("spearman", [1, 2, 3, 4], [1, 10, 100, 1000], 1),
        # ranks 0, 1, 2 and 0, 1.5, 1.5, as in the line for Pearson
        ("spearman", [5, 6, 7], [0, 9, 9], math.sqrt(3) / 2),
    ],
)
def test_metrics(metric, found, truth, expected):
    assert METRICS[metric](found, truth) == pytest.approx(expected)


def test_metrics_refuse_answers_that_are_not_one_for_one():
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=r"shorter|longer"):
            metric([1, 0, 1], [1, 0])


COMMONSENSE = [
    # the text, the right answer, what is read, whether it is right
    ("the correct answer is {0}", "{0}", True),
    ("the correct answer is {0}\n", "{0}", True),
    ("I think the correct answer is {0}", "{0}", True),
    ("the correct answer is {1}", "{1}", False),
    ("the correct answer is {0} because", "{0} because", False),
    ("the correct answer is ", "", False),
    ("the correct answer is{0}", "", False),
    ("{0}", "", False),
    ("The Correct Answer Is {0}", "", False),
    ("", "", False),
]
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution2", "solution1"),
    "social_i_qa": ("answer3", "answer1"),
    "hellaswag": ("ending4", "ending1"),
    "winogrande": ("option2", "option1"),
    "ARC-Easy": ("answer1", "answer4"),
    "ARC-Challenge": ("answer5", "answer4"),
    "openbookqa": ("answer2", "answer3"),
}


@pytest.mark.parametrize("task", suites.COMMONSENSE.tasks)
def test_commonsense_answers(task):
    for text, read, right in COMMONSENSE:
        found = suites.COMMONSENSE.extract(text.format(*CHOICES[task]), CHOICES[task][0])
        assert found == read.format(*CHOICES[task])
        assert same(found, CHOICES[task][0]) is right


@pytest.mark.parametrize(
    ("task", "text", "answer", "read", "right"),
    [
        ("AQuA", "252 gms. The answer is (C).", "C", "C", True),
        ("AQuA", "so C", "C", "C", True),
        ("AQuA", "The answer is (D).", "C", "D", False),
        ("AQuA", "Anna pays (C).", "C", "A", False),  # the published rule takes the first letter
        ("AQuA", "the answer is c", "C", "", False),
        ("AQuA", "It is 252.", "C", "", False),
        ("gsm8k", "3 + 15 = 18 eggs. The answer is 18.", "18", "18.", True),
        ("gsm8k", "The answer is 18.0 dollars", "18", "18.0", True),
        ("gsm8k", "she makes $70,000", "70000", "70000", True),
        ("gsm8k", "18 eggs for 2 dollars", "18", "2", False),
        ("gsm8k", "The answer is -18.", "18", "-18.", False),
        ("gsm8k", "", "18", "", False),
        ("gsm8k", "eighteen", "18", "", False),
        ("mawps", "The answer is 3.3335", "3.333", "3.3335", True),  # off by half a thousandth
        ("mawps", "The answer is 3.34", "3.333", "3.34", False),
        ("mawps", "10 / 4 = 2.5", "2.5", "2.5", True),
        ("SVAMP", "14 + 8 = 22 kids", "22.0", "22", True),
        ("SVAMP", "14 + 8", "22.0", "8", False),
        ("SVAMP", "....", "22.0", "", False),
    ],
)
def test_arithmetic_answers(task, text, answer, read, right):
    assert task in suites.ARITHMETIC.tasks
    found = suites.ARITHMETIC.extract(text, answer)
    assert found == read
    assert same(found, answer) is right


@pytest.mark.parametrize(
    ("task", "outputs", "truth", "expected"),
    [
        ("mnli", [[3, 1, 0], [0, 1, 0], [0, 0, 2], [0, 0, 2]], [0, 1, 2, 0], {"accuracy": 3 / 4}),
        ("sst2", [[1, 0], [0, 1]], [0, 0], {"accuracy": 1 / 2}),
        ("mrpc", [[0, 1], [0, 1], [1, 0]], [1, 0, 0], {"accuracy": 2 / 3, "f1": 2 / 3}),
        ("cola", [[0, 1], [1, 0]], [1, 0], {"matthews": 1}),
        ("qnli", [[0, 1], [1, 0]], [1, 1], {"accuracy": 1 / 2}),
        ("qqp", [[0, 1], [1, 0]], [1, 1], {"accuracy": 1 / 2, "f1": 2 / 3}),
        ("rte", [[0, 1], [1, 0]], [0, 1], {"accuracy": 0}),
        ("stsb", [[0.1], [0.3], [0.2]], [1, 2, 3], {"pearson": 1 / 2, "spearman": 1 / 2}),
    ],
)
def test_glue_scores(task, outputs, truth, expected):
    task = glue.TASKS[task]
    assert score(task, predictions(task, torch.tensor(outputs)), truth) == pytest.approx(expected)
