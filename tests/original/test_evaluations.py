"""What `original_programs.py` answers under pyreft 0.1.0, with pyvene 0.1.8 and transformers 4.45.1, it does here."""

import pytest

from original_programs import by_hooks, composition, concepts, evaluation, preferences, steering
from pyreft.interventions.pyvene import (
    DistributedRepresentationIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)

GREEDY = [[32, 90, 64, 74, 14, 91], [32, 90, 16, 64, 2, 0], [32, 90, 64, 2, 0, 0], [32, 90, 16, 20, 3, 16]]
BEAMS = [[32, 90, 16, 64, 16, 64], [32, 90, 16, 64, 16, 64], [32, 90, 16, 64, 16, 64], [32, 90, 16, 20, 3, 16]]
SHARED = [[12, 17, 77, 74, 66, 77], [12, 17, 77, 23, 46, 20], [12, 72, 19, 24, 91, 47], [12, 72, 19, 24, 91, 47]]


def test_an_evaluation_that_shifts_its_locations():
    assert evaluation(1) == GREEDY


def test_beams_of_the_original():
    assert evaluation(4) == BEAMS
    assert evaluation(4, "f3+l1", share_weights=True) == SHARED


def test_composition():
    answers, losses = composition()
    assert answers == [
        [78, 90, 16, 64, 74, 14],
        [49, 3, 31, 90, 16, 64],
        [12, 90, 16, 64, 74, 14],
        [19, 0, 90, 16, 64, 74],
        [12, 90, 16, 64, 74, 14],
        [58, 24, 53, 0, 90, 16],
    ]
    assert losses == pytest.approx([4.5288, 4.5288, 4.6291, 4.5604, 4.5291, 4.5196], abs=2e-4)


def test_preferences():
    expected = [-9.3026, -9.4471, -9.1464, -9.1011, -9.2616, -9.1077, -9.2685, -9.3192, 0.7114]
    assert preferences() == pytest.approx(expected, abs=2e-4)


def test_a_model_wrapped_by_hooks():
    loss, tokens = by_hooks()
    assert loss == pytest.approx(4.6282, abs=2e-4)
    assert tokens == [12, 12, 12, 12]


def test_steering_by_concept():
    tokens, total = steering([SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention])
    assert tokens == [[32, 32, 32, 32], [49, 49, 49, 49], [21, 21, 21, 21], [59, 90, 16, 64]]
    assert total == pytest.approx(0.302, abs=2e-3)


def test_many_concepts_of_what_was_learned_one_by_one():
    tokens, loss = concepts([SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention])
    assert tokens == [[12, 90, 64, 74], [46, 47, 46, 47], [12, 72, 19, 24], [59, 90, 16, 64]]
    assert loss == pytest.approx(4.6751, abs=2e-4)
