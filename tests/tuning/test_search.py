"""The study: it goes on after a stop as if nothing had been, and with nothing that is not its own."""

import pytest

import pyreft
from pyreft.jobs.settings import TrainingJob
from pyreft.tuning.records import DONE, PRUNED, RUNNING, STOPPED, Record, best_of, frontier, value_of
from pyreft.tuning.space import find_space
from pyreft.tuning.study import Study

pytest.importorskip("optuna", reason="the extra `tune` is not installed")
ROWS = [{"labels": [-100] * 20 + [5, 6]}] * 80
PRINT = {"data": {"rows": 8, "sha256": "a"}, "model": "m", "settings": {"seed": 1}}


@pytest.fixture
def space(model):
    return find_space(model, TrainingJob(), ROWS, most=4000)


def opened(directory, space, seed=1):
    directory.mkdir(exist_ok=True)
    study = Study(directory, space, seed, warmup=0)
    study.begin(PRINT)
    return study


def record_of(space, trial, point, **changes):
    return Record(trial.number, space.settings(point), point, False, space.count(point), **changes)


def tried(study, space, most):
    """Run trials whose score is some function of the point."""
    points = []
    while (found := study.ask(most)) is not None:
        trial, point = found
        points.append(point)
        value = abs(point["lr"] - 0.01) + 0.1 * (point["edit"] != "lora at value_output,attention_output")
        study.tell(trial, record_of(space, trial, point, state=DONE, value=value, loss=value))
    return points


def test_a_study_goes_on_as_if_it_had_not_been_stopped(tmp_path, space, monkeypatch):
    monkeypatch.setattr("pyreft.tuning.study._RANDOM", 3)
    whole = tried(opened(tmp_path / "whole", space), space, 5)
    assert whole[: len(space.starts)] == [*space.starts]
    first = tried(opened(tmp_path / "parts", space), space, 3)
    study = opened(tmp_path / "parts", space)
    trial, point = study.ask(5)
    study.note(trial, record_of(space, trial, point))
    assert study.records()[-1].state == RUNNING
    again = opened(tmp_path / "parts", space)  # the trial before was killed
    assert again.records()[-1].state == STOPPED
    assert [*first, *tried(again, space, 5)] == whole
    assert point == whole[3]


def test_other_seeds_try_others(tmp_path, space):
    one, other = (tried(opened(tmp_path / str(seed), space, seed), space, 3) for seed in (1, 2))
    assert one[:2] == other[:2]
    assert one[2:] != other[2:]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": {"rows": 9, "sha256": "b"}}, r"other data \(8 rows, now 9\)"),
        ({"model": "n"}, r"other base model \(or another release of torch or transformers\)"),
        ({"settings": {"seed": 2}}, r"other settings \(seed = 1, now 2\)"),
    ],
)
def test_a_study_of_something_else_is_refused(tmp_path, space, changed, words):
    study = opened(tmp_path, space)
    with pytest.raises(pyreft.ReftError, match=f"^resume: the study was begun with {words}; go on with the same, or"):
        study.begin(PRINT | changed)


def test_what_is_no_study_is_refused(tmp_path, space):
    (tmp_path / "study.db").write_bytes(b"no database at all" * 500)
    with pytest.raises(pyreft.ReftError, match=r"study\.db: the study is damaged"):
        opened(tmp_path, space)


def test_a_study_that_is_cut_short_is_refused(tmp_path, space):
    tried(opened(tmp_path, space), space, 3)
    path = tmp_path / "study.db"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(pyreft.ReftError, match=r"study\.db: the study is damaged"):
        opened(tmp_path, space)


def test_what_decides_is_told_where_enough_is_known(tmp_path, space):
    study = opened(tmp_path, space)
    tried(study, space, 5)
    assert study.importances() == {}
    tried(study, space, 12)
    found = study.importances()
    assert set(found) == set(space.NAMES)
    assert sum(found.values()) == pytest.approx(1)


def test_the_share_of_right_answers_comes_before_the_loss():
    assert value_of(9e9, 0.5, 10) < value_of(0.0, 0.4, 10)
    assert value_of(1.0, 0.5, 10) < value_of(1.1, 0.5, 10)
    assert value_of(1.0, None, 10) == 1.0


def test_the_frontier_has_what_no_cheaper_one_is_as_good_as():
    figures = [(100, 5.0, 0.5), (50, 9.0, 0.5), (200, 1.0, 0.4), (300, 2.0, 0.6)]
    records = [
        Record(n, {}, {}, False, size, state=DONE, seconds=seconds, value=value)
        for n, (size, seconds, value) in enumerate(figures)
    ]
    records.append(Record(9, {}, {}, False, 1, state=PRUNED))
    assert [record.number for record in frontier(records, "parameters")] == [1, 2]
    assert [record.number for record in frontier(records, "seconds")] == [2]
    assert best_of(records).number == 2
