"""The study of small adapters: its tasks, what is made of its rows, and the command from end to end."""

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

import pyreft
from _study import training
from _study.comparing import compare_rules, frontier, means, score_at
from _study.running import run_study
from _study.settings import FULL, QUICK, RULES, Setting
from _study.tasks import TASKS, load_task, read_tasks
from pyreft import pocket
from study import app, main


def row(positions, scores, seconds, *, task="a", seed=0, method="LoReFT", rank=4):
    """A row of a study, made by hand."""
    setting = Setting(method, rank, positions)
    curve = [
        {"step": n, "seconds": s, "score": score} for n, (s, score) in enumerate(zip(seconds, scores, strict=True), 1)
    ]
    common = {"task": task, "name": setting.name, **dataclasses.asdict(setting)}
    return {**common, "parameters": 10 * rank, "lr": 0.01, "validation": {}, "seed": seed, "curve": curve}


def point(name, parameters, score):
    return {"name": name, "parameters": parameters, "score": score}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([point("a", 1, 0.5)], ["a"]),
        ([point("a", 1, 0.5), point("b", 2, 0.5)], ["a"]),  # as good and dearer
        ([point("b", 2, 0.9), point("a", 1, 0.5)], ["a", "b"]),
        ([point("a", 1, 0.5), point("b", 1, 0.6), point("c", 3, 0.55)], ["b"]),
        ([point("a", 1, 0.5), point("b", 1, 0.5)], ["a", "b"]),  # none beats its equal
        ([], []),
    ],
)
def test_the_frontier_is_what_no_other_beats(points, expected):
    assert frontier(points, "parameters") == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0, 0), (1, 0.2), (2, 0.4), (3, 0.5), (4, 0.6), (9, 0.6)])
def test_a_score_is_read_between_two_measured_ones(seconds, expected):
    curve = [{"seconds": 2.0, "score": 0.4}, {"seconds": 4.0, "score": 0.6}]
    assert score_at(curve, seconds) == pytest.approx(expected)


def test_means_and_spread_are_over_seeds():
    rows = [row("l4", [0.1, 0.4], [1, 2]), row("l4", [0.3, 0.8], [2, 4], seed=1), row("l1", [0.2], [1])]
    first, second = means(rows)
    assert (first["name"], first["score"], first["seconds"]) == ("LoReFT r4 l4", pytest.approx(0.6), 3)
    assert first["sd"] == pytest.approx(0.08**0.5)
    assert (second["name"], second["sd"]) == ("LoReFT r4 l1", None)


def test_rules_are_compared_at_equal_steps_and_at_equal_seconds():
    rows = [
        *(row("l4", [0.4, 0.6], [1, 2], seed=seed) for seed in (0, 1)),
        row("f7+l7", [0.4, 0.8], [4, 8], seed=0),  # after 2 s half of the way to 0.4
        row("f7+l7", [0.2, 0.6], [4, 8], seed=1),
        row("l4", [0.9], [1], seed=0, rank=8),  # another rank: not compared
        row(None, [0.9], [1], seed=0, method="LoRA"),
    ]
    found = compare_rules(rows, "f7+l7")
    task = found["tasks"]["a"]
    assert task["seconds"] == 2  # the cheapest rule's
    assert task["rules"]["l4"] == {"score": pytest.approx(0.6), "score_then": pytest.approx(0.6), "seconds": 2}
    assert task["rules"]["f7+l7"] == {"score": pytest.approx(0.7), "score_then": pytest.approx(0.15), "seconds": 8}
    assert found["against"]["baseline"] == "f7+l7"
    assert found["against"].keys() == {"baseline", "l4"}
    steps, seconds = (found["against"]["l4"][kind] for kind in ("steps", "seconds"))
    assert steps == {"mean": pytest.approx(-0.1), "error": pytest.approx(0.1)}  # of -0.2 and 0.0
    assert seconds == {"mean": pytest.approx(0.45), "error": pytest.approx(0.05)}  # of 0.4 and 0.5


def test_a_single_pair_has_no_error_and_no_baseline_no_difference():
    one = [row("l4", [0.5], [1]), row("f7+l7", [0.5], [2])]
    assert compare_rules(one, "f7+l7")["against"]["l4"]["steps"] == {"mean": 0, "error": None}
    assert compare_rules(one[:1], "f7+l7")["against"] == {"baseline": "f7+l7"}


@pytest.mark.parametrize("name", TASKS)
def test_splits_of_a_task_share_no_prompt(name):
    task = load_task(name)
    splits = [{prompt for prompt, _ in split} for split in (task.train, task.validation, task.heldout)]
    assert [len(split) for split in splits] == ([10, 40, 50] if "emoji" in name else [96, 40, 100])
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_a_long_task_is_the_short_one_behind_a_conversation():
    _, tokenizer = pocket.load()
    for short in ("emoji", "middle"):
        for (prompt, answer), (behind, same) in zip(
            load_task(short).heldout, load_task(f"{short}-long").heldout, strict=True
        ):
            assert behind.endswith(prompt)
            assert answer == same
            assert len(tokenizer(behind)["input_ids"]) - len(tokenizer(prompt)["input_ids"]) > 80


def test_the_full_plan_compares_every_rule_in_every_task():
    cells = FULL.cells(list(TASKS))
    rules = [(s.positions, task) for s, tasks in cells if s.is_rule for task in tasks]
    assert sorted(rules) == sorted((rule, task) for rule in RULES for task in TASKS)
    assert {s.method for s, _ in cells} == {"LoReFT", "DiReFT", "RED", "LoRA", "located LoRA"}
    assert all(tasks in (["emoji"], ["middle"]) for s, tasks in cells if not s.is_long)
    assert FULL.cells(["middle-long"]) == [(s, ["middle-long"]) for s in FULL.settings if s.is_long]
    assert {s.name for s in FULL.settings if s.is_long and not s.is_rule} == {
        "LoRA r1",
        "LoRA r8",
        "located LoRA r1 l16",
        "located LoRA r1 l16 dropout 0.3",
    }


def test_direft_is_the_papers():
    model = Setting("DiReFT", 2, "l4").adapt(pocket.load()[0])
    assert {type(m) for m in model.modules() if isinstance(m, pyreft.interventions.Intervention)} == {
        pyreft.NodireftIntervention
    }


def run(*arguments, status=0):
    """Run the command in this process; errors of the library come out as they would in `main`."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.mark.slow
def test_the_quick_study_from_end_to_end(tmp_path):
    printed = run("--quick", "--jobs", 1, "--tasks", "emoji;middle-long", "--output", tmp_path)
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["complete"]
    assert found["plan"]["settings"] == [setting.name for setting in QUICK.settings]
    assert {"torch", "transformers", "peft", "pyreft"} <= found["machine"].keys()
    assert [(r["task"], r["name"]) for r in found["rows"]] == [
        *((task, "LoReFT r4 l4") for task in ("emoji", "middle-long")),
        *((task, "LoReFT r4 f7+l7") for task in ("emoji", "middle-long")),
        *((task, "LoRA r1") for task in ("emoji", "middle-long")),
    ]
    for each in found["rows"]:
        assert each["parameters"] == (5376 if each["method"] == "LoRA" else 7 * (2 * 192 * 4 + 4))
        assert [mark["step"] for mark in each["curve"]] == list(QUICK.marks)
        assert 0 < each["curve"][0]["seconds"] < each["curve"][1]["seconds"]
        assert all(0 <= mark["score"] <= 1 for mark in each["curve"])
    assert found["frontier"].keys() == {"emoji", "middle-long"}
    assert found["rules"]["against"]["l4"].keys() == {"steps", "seconds"}
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "study.svg").read_text()
    assert "LoReFT r4 l4" in printed
    assert "l4 against f7+l7" in printed


def test_the_learning_rate_is_chosen_on_the_validation_split(monkeypatch):
    asked = []
    score = training.Run.score

    def noted(run, pairs):
        asked.append((run.optimizer.param_groups[0]["lr"], tuple(pairs)))
        return score(run, pairs)

    monkeypatch.setattr(training.Run, "score", noted)
    plan = dataclasses.replace(QUICK, lrs=(1e-2, 1e-7), marks=(8,))
    (found,) = training.run_cell(QUICK.settings[0], ["emoji-long"], plan)
    data, short = load_task("emoji-long"), load_task("emoji")
    assert asked == [(1e-7, short.validation), (1e-2, short.validation), (1e-2, data.heldout[:10])]
    assert found["validation"]["1e-07"] == 0 < found["validation"]["0.01"]
    assert found["lr"] == 1e-2


def test_what_is_trained_does_not_depend_on_the_number_of_processes(tmp_path):
    plan = dataclasses.replace(QUICK, settings=QUICK.settings[:1], marks=(6,))
    alone, together = (run_study(tmp_path, plan=plan, tasks="emoji", jobs=jobs) for jobs in (1, 2))
    for found in (alone, together):
        (mark,) = found["rows"][0]["curve"]
        assert mark.pop("seconds") > 0
    assert alone["rows"] == together["rows"]
    assert alone["complete"]
    assert together["complete"]


def test_an_interrupted_study_leaves_what_is_done(tmp_path):
    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    plan = dataclasses.replace(QUICK, marks=(1,))
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, plan=plan, tasks="emoji", jobs=1, progress=stop)
    found = json.loads((tmp_path / "study.json").read_text())
    assert not found["complete"]
    assert [r["name"] for r in found["rows"]] == ["LoReFT r4 l4"]
    assert found["means"][0]["name"] == "LoReFT r4 l4"


def test_names_of_tasks_are_read():
    assert read_tasks("all") == list(TASKS)
    assert read_tasks(" middle, emoji;middle") == ["middle", "emoji"]


@pytest.fixture
def nothing_trained(monkeypatch):
    """A training that begins fails the test."""
    monkeypatch.setattr("_study.running.run_cell", lambda *_: pytest.fail("training began"))


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "emojis"], r"tasks: expected emoji, middle, .*, got 'emojis'. Did you mean 'emoji'\?"),
        (["--tasks", ";"], "tasks: expected 'all' or some of emoji, .*, got none"),
        (["--seeds", "0"], "seeds: expected 1 or more, got 0"),
        (["--jobs", "0"], "jobs: expected 1 or more, got 0"),
    ],
)
def test_bad_input_is_told_before_the_work(tmp_path, arguments, message):
    with pytest.raises(pyreft.ReftError, match=message):
        run("--quick", "--jobs", 1, "--output", tmp_path, *arguments)


def test_a_mistake_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--tasks", "emojis"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("study: --tasks: expected emoji, middle, ")


@pytest.mark.usefixtures("nothing_trained")
def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pyreft.ReftError, match=r"file cannot be written .*; name another directory"):
        run("--quick", "--jobs", 1, "--output", tmp_path / "file")


@pytest.mark.usefixtures("nothing_trained")
def test_a_missing_matplotlib_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pyreft.ReftError, match="matplotlib, which is not installed"):
        run("--quick", "--jobs", 1, "--output", tmp_path)
    with pytest.raises(pyreft.ReftError, match="Did you mean 'emoji'"):  # what else is wrong goes first
        run("--quick", "--tasks", "emojis", "--output", tmp_path)
