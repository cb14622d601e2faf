"""The exception: what it carries, and what is written of it."""

import ast
import copy
import pickle
import re
from pathlib import Path

import pytest

import pyreft
from pyreft.errors import ReftError
from pyreft.positions import Positions

SOURCE = Path(pyreft.__file__).parents[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected 1, got 2."),
        ({"setting": "rank"}, "rank: expected 1, got 2."),
        ({"where": "a.yaml"}, "a.yaml: expected 1, got 2."),
        ({"setting": "rank", "where": "a.yaml"}, "a.yaml: rank: expected 1, got 2."),
    ],
)
def test_the_names_stand_before_the_message(given, message):
    error = ReftError("expected 1, got 2.", **given)
    assert str(error) == message
    assert (error.setting, error.where) == (given.get("setting"), given.get("where"))
    assert isinstance(error, ValueError)


def test_an_error_names_the_setting_it_is_about():
    with pytest.raises(ReftError, match=r"^positions: expected f<n>, l<n>") as told:
        Positions.parse("last")
    assert told.value.setting == "positions"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_and_a_pickle_keep_message_and_setting(again):
    error = ReftError("choose it, or `resume`.", setting="output", where="a.yaml", also=["resume"])
    same = again(error)
    assert type(same) is ReftError
    assert str(same) == str(error) == "a.yaml: output: choose it, or `resume`."
    assert vars(same) == vars(error)
    assert same.told({"output": "--output", "resume": "--resume"}) == "a.yaml: --output: choose it, or --resume."


def test_only_settings_are_told_by_other_names():
    error = ReftError("data: 'data' and `data` came, and data; see 'lr'.", setting="data", also=["lr"])
    assert error.told({"data": "--data", "lr": "--lr"}) == "--data: data: 'data' and `data` came, and data; see --lr."


# what is no setting: functions, a module and a class
OTHERS = {
    *("add_weighted_adapter", "compare_edits", "diff_mean", "generate_batch", "loss_by_strength", "plot_comparison"),
    *("harness", "reach"),
}


def written_by_hand(tree):
    """The errors whose text begins with the name of a setting, instead of carrying it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ReftError" and node.args:
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            begin = re.match(r"([a-z_]+): ", first.value) if isinstance(first, ast.Constant) else None
            if begin and begin[1] not in OTHERS:
                yield node.lineno, begin[1]


def test_no_error_writes_its_setting_by_hand():
    files = sorted(SOURCE.glob("pyreft*/**/*.py"))
    assert len(files) > 80
    trees = ((path.relative_to(SOURCE), ast.parse(path.read_text(encoding="utf-8"))) for path in files)
    assert [(str(path), *found) for path, tree in trees for found in written_by_hand(tree)] == []
