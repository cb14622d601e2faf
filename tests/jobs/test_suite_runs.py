"""The suites from data to row: trained by a recipe, scored, and shown beside the paper's figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import suite_data
from commands import run
from conftest import tiny_llama
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.jobs.classify import encode_pairs, score
from pyreft.jobs.evaluate import evaluate
from pyreft.jobs.prepare import prepare
from pyreft.jobs.recipes import recipe_jobs
from pyreft.loading import check_classifier, load_adapted
from pyreft.tasks import glue
from pyreft_cli.app import app

FAST = {
    "max_length": 200,
    "dtype": "float32",
    "batch_size": 8,
    "gradient_accumulation": 1,
    "warmup_ratio": 0,
    "weight_decay": 0,
}


def options(**given):
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    suite_data.commonsense(root)
    suite_data.arithmetic(root)
    suite_data.instruct(root)
    suite_data.glue(root)
    suite_data.tiny_roberta(root / "encoder")
    return root


@pytest.fixture(scope="module")
def commonsense(data, tmp_path_factory):
    """An adapter that has learned BoolQ's part of the training file alone."""
    out = tmp_path_factory.mktemp("adapters") / "commonsense"
    arguments = options(data_dir=data, output=out, epochs=6, lr=0.02, limit=21, **FAST)
    return out, json.loads(run("train", "commonsense", *arguments, "--json").stdout)


def test_commonsense_fills_its_row(data, commonsense):
    out, trained = commonsense
    assert (trained["examples"], trained["steps"], trained["skipped"]) == (21, 18, 0)
    row = json.loads(run("eval", out, "--suite", "commonsense", "--data-dir", data, "--json").stdout)
    assert list(row["tasks"]) == list(suite_data.CHOICES)
    assert (row["tasks"]["boolq"]["score"], row["tasks"]["boolq"]["paper"]) == (100, 69.3)
    assert row["tasks"]["hellaswag"]["score"] == 0  # it has learned to say "false"
    assert row["average"] == sum(task["score"] for task in row["tasks"].values()) / 8
    assert (row["method"], row["paper"]["model"], row["paper"]["average"]) == ("LoReFT", "LLaMA-7B", 80.2)
    assert row["parameters"] == trained["parameters"] == 7 * (2 * 8 * 192 + 8)
    record = json.loads((out / "recipe.json").read_text())
    assert (record["suite"], record["rank"], record["positions"], record["limit"]) == ("commonsense", 8, "f7+l7", 21)


def test_the_row_reads_well(data, commonsense, tmp_path):
    arguments = ("--suite", "commonsense", "--data-dir", data, "--task", "boolq", "--task", "piqa", "--limit", 2)
    printed = run("eval", commonsense[0], *arguments, "--output", tmp_path / "out").stdout
    for words in ("BoolQ", "100.0", "69.3", "HellaSwag", "LLaMA-7B, LoReFT", "only the first 2 questions", "80.2"):
        assert words in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["boolq.json", "piqa.json"]
    first, second = json.loads((tmp_path / "out" / "boolq.json").read_text())
    assert first["output"].strip() == "the correct answer is false"
    assert (second["found"], second["answer"], second["right"]) == ("false", "false", True)


def test_lora_beside_it_on_the_same_data(data, tmp_path):
    out = tmp_path / "lora"
    arguments = options(data_dir=data, output=out, method="lora", epochs=3, lr=0.003, limit=21, **FAST)
    printed = run("train", "commonsense", *arguments).stdout
    assert f"Try: pyreft eval {out} --suite commonsense --data-dir {data}" in printed.replace("\n", "")
    row = evaluate(out, "commonsense", data, tasks=["boolq"])
    assert (row["method"], row["tasks"]["boolq"]["score"], row["tasks"]["boolq"]["paper"]) == ("LoRA", 100, 68.9)
    assert row["average"] is None
    assert row["parameters"] == 7 * 32 * (192 + 192 + 2 * (192 + 192) + 2 * (192 + 512))
    with pytest.raises(ReftError, match="this is one of the type 'LORA'"):
        run("info", out)
    with pytest.raises(ReftError, match=r"resume: .* was made with r = 32, now it is 4"):
        run("train", "commonsense", *arguments, "--rank", 4, "--resume")


def test_a_recipe_of_ones_own_says_how_answers_are_generated(data, tmp_path):
    mine, out = tmp_path / "mine.yaml", tmp_path / "mine"
    mine.write_text("suite: commonsense\ndecoding: {max_new_tokens: 3}\nmethods: {loreft: {positions: l1}}\n")
    run("train", mine, *options(data_dir=data, output=out, epochs=1, limit=4, **FAST))
    assert json.loads((out / "recipe.json").read_text())["decoding"] == {"max_new_tokens": 3}
    tokenizer = pocket.load()[1]

    def longest(*given):
        command = ("eval", out, "--suite", "commonsense", "--data-dir", data, "--task", "boolq")
        run(*command, "--output", tmp_path / "answers", *given)
        rows = json.loads((tmp_path / "answers" / "boolq.json").read_text())
        return max(len(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) for row in rows)

    assert longest() <= longest("--greedy") <= 3 < longest("--max-new-tokens", 9)


def test_arithmetic_is_drawn_and_searched_or_greedy(data, tmp_path):
    out = tmp_path / "direft"
    arguments = options(data_dir=data, output=out, method="direft", epochs=1, lr=0.01, limit=8, **FAST)
    run("train", "arithmetic", *arguments)
    command = ("eval", out, "--suite", "arithmetic", "--data-dir", data, "--max-new-tokens", 8, "--json")
    drawn = [json.loads(run(*command, "--seed", 1, "--output", tmp_path / "drawn").stdout) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert [task["count"] for task in drawn[0]["tasks"].values()] == [1, 3, 3, 3]
    assert (drawn[0]["method"], drawn[0]["paper"]["average"]) == ("DiReFT", 40.6)
    run(*command, "--greedy", "--output", tmp_path / "greedy")
    texts = [
        [row["output"] for row in json.loads((tmp_path / kind / "gsm8k.json").read_text())]
        for kind in ("drawn", "greedy")
    ]
    assert texts[0] != texts[1]


def test_instructions_are_answered_as_a_judge_takes_them(data, tmp_path):
    out = tmp_path / "instruct"
    changes = FAST | {"layers": "1;3"}
    run("train", "instruct", *options(data_dir=data, output=out, epochs=1, lr=0.01, **changes))
    command = ("eval", out, "--suite", "instruct", "--data-dir", data, "--max-new-tokens", 8)
    with pytest.raises(ReftError, match="output: the answers of instruct are for a judge to read; name a directory"):
        run(*command)
    row = json.loads(run(*command, "--output", tmp_path / "answers", "--json").stdout)
    assert row["tasks"]["alpaca_eval"] == {"metric": "judge", "score": None, "metrics": {}, "count": 3, "paper": 85.6}
    answers = json.loads((tmp_path / "answers" / "alpaca_eval.json").read_text())
    assert [answer["instruction"] for answer in answers] == [q["prompt"] for q in pocket.emoji_questions()[:3]]
    assert {(answer["generator"], answer["dataset"]) for answer in answers} == {("instruct", "pocket")}
    assert all(set(answer) == {"instruction", "output", "generator", "dataset"} for answer in answers)


def test_a_question_that_leaves_no_room_is_told(data, commonsense, tmp_path):
    rows = [{"instruction": "a", "answer": "true"}, {"instruction": "a " * 300, "answer": "true"}]
    suite_data.write_json(tmp_path / "boolq" / "test.json", rows)
    with pytest.raises(ReftError, match=r"boolq/test.json, row 2: the prompt has \d+ tokens; 256 leave no room for"):
        evaluate(commonsense[0], "commonsense", tmp_path, tasks=["boolq"])
    with pytest.raises(ReftError, match=r"the prompt has \d+ tokens; 20 leave no room for an answer"):
        evaluate(commonsense[0], "commonsense", data, tasks=["boolq"], decoding={"max_length": 20})


# -- GLUE --------------------------------------------------------------------------------------------------------------

TINY = {"max_length": 60, "batch_size": 8, "epochs": 12, "lr": 0.02, "dropout": 0}


@pytest.mark.parametrize(
    ("task", "method"), [("sst2", "loreft"), ("rte", "lora"), ("stsb", "direft"), ("cola", "direft")]
)
def test_a_task_of_glue(data, tmp_path, task, method):
    """The label is told by the words; the edits, or LoRA, and the classifier find out how."""
    out = tmp_path / task
    arguments = options(model=data / "encoder", data_dir=data, output=out, task=task, method=method, **TINY)
    trained = json.loads(run("train", "glue", *arguments, "--json").stdout)
    assert (trained["examples"], trained["validation_examples"]) == (32, 4)
    row = json.loads(run("eval", out, "--suite", "glue", "--data-dir", data, "--json").stdout)
    assert list(row["tasks"]) == [task]
    assert row["tasks"][task]["score"] >= 90
    assert row["tasks"][task]["count"] == 4
    assert row["parameters"] == trained["parameters"]
    assert trained["parameters"] == (2 * (2 * 32 + 1) if method != "lora" else 2 * 2 * 8 * 64)


def test_the_best_epoch_is_kept(data, tmp_path):
    job = recipe_jobs("glue", {"task": "mnli", "model": str(data / "encoder"), "data_dir": data, **TINY, "epochs": 4})
    job[0].output = str(tmp_path / "out")
    prepared = prepare(job[0])
    result = prepared.train()
    scores = [entry["eval_accuracy"] for entry in history(tmp_path / "out")]
    assert len(scores) == 4
    assert result["best"] == max(scores)
    adapted, tokenizer = load_adapted(tmp_path / "out", labels=3)
    task = glue.TASKS["mnli"]
    choosing, scored = glue.split_validation(glue.read(task, "validation", data), 42)
    assert not {id(p) for p in choosing} & {id(p) for p in scored}
    rows = encode_pairs(tokenizer, task, choosing, 60)
    batch = tokenizer.pad([{k: v for k, v in r.items() if k != "labels"} for r in rows], return_tensors="pt")
    found = adapted(**batch).logits.argmax(-1).tolist()
    assert score(task, found, [pair.label for pair in choosing])["accuracy"] == result["best"]


def test_a_task_that_was_cut_off_goes_on(data, tmp_path):
    given = {"task": "sst2", "model": str(data / "encoder"), "data_dir": data, **TINY, "epochs": 3}
    (whole,) = recipe_jobs("glue", given | {"output": tmp_path / "whole"})
    (part,) = recipe_jobs("glue", given | {"output": tmp_path / "part"})
    prepare(whole).train()

    def interrupt(step, *_):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(part).train(interrupt)
    part.resume = True
    assert prepare(part).train()["steps"] == 12
    kept = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert kept[0] == kept[1]


def history(out):
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    return [e for e in json.loads((last / "trainer_state.json").read_text())["log_history"] if "eval_loss" in e]


def test_a_classifier_is_scored_in_the_type_it_was_trained_in(data, tmp_path, monkeypatch):
    few = TINY | {"epochs": 1, "limit": 8, "dtype": "bfloat16"}
    run("train", "glue", *options(model=data / "encoder", data_dir=data, output=tmp_path / "a", task="rte", **few))
    types = []

    def noted(*given):
        model, tokenizer = load_adapted(*given)
        types.append(model.dtype)
        return model, tokenizer

    monkeypatch.setattr("pyreft.jobs.evaluate.load_adapted", noted)
    for dtype in (None, "float32"):
        evaluate(tmp_path / "a", "glue", data, dtype=dtype)
    assert types == [torch.bfloat16, torch.float32]


def test_all_tasks_of_glue_one_after_the_other(data, tmp_path):
    few = TINY | {"epochs": 1, "limit": 8}
    command = ("train", "glue", *options(model=data / "encoder", data_dir=data, output=tmp_path / "all", **few))
    results = json.loads(run(*command, "--json").stdout)
    assert [result["output"] for result in results] == [str(tmp_path / "all" / task) for task in glue.TASKS]
    row = evaluate(tmp_path / "all", "glue", data, output=tmp_path / "answers")
    assert list(row["tasks"]) == list(glue.TASKS)
    assert row["average"] == pytest.approx(sum(task["score"] for task in row["tasks"].values()) / 8)
    assert len(json.loads((tmp_path / "answers" / "stsb.json").read_text())) == 4
    some = evaluate(tmp_path / "all", "glue", data, tasks=["rte", "SST-2"])
    assert list(some["tasks"]) == ["rte", "sst2"]
    with pytest.raises(ReftError, match=r"rte: this directory already holds"):
        run(*command, "--task", "rte", "--output", tmp_path / "all" / "rte")


def test_data_of_all_tasks_is_checked_before_the_first_is_trained(data, tmp_path):
    suite_data.glue(tmp_path / "part", ["mnli"])
    arguments = options(model=data / "encoder", data_dir=tmp_path / "part", output=tmp_path / "all", **TINY)
    with pytest.raises(ReftError, match=r"expected SST-2/train.tsv"):
        run("train", "glue", *arguments)
    assert not (tmp_path / "all").exists()


# -- what is refused before the work starts ----------------------------------------------------------------------------


def test_an_encoder_cannot_generate(data, tmp_path):
    with pytest.raises(ReftError, match=r"expected a causal language model, .* holds a RobertaForMaskedLM"):
        run("train", "commonsense", *options(model=data / "encoder", data_dir=data, output=tmp_path / "out", **FAST))


def test_an_encoders_adapter_cannot_be_asked_to_generate(data, tmp_path):
    few = TINY | {"epochs": 1, "limit": 8}
    run("train", "glue", *options(model=data / "encoder", data_dir=data, output=tmp_path / "a", task="rte", **few))
    with pytest.raises(ReftError, match=r"a: this is a classifier's adapter, for rte; it cannot be asked to generate"):
        evaluate(tmp_path / "a", "commonsense", data)
    with pytest.raises(ReftError, match="is an adapter for rte, got stsb"):
        evaluate(tmp_path / "a", "glue", data, tasks=["stsb"])
    (tmp_path / "a" / "recipe.json").unlink()
    with pytest.raises(ReftError, match=r"has no recipe.json that says for which task"):
        evaluate(tmp_path / "a", "glue", data)
    with pytest.raises(ReftError, match="its classifier was not trained for 3 outputs"):
        evaluate(tmp_path / "a", "glue", data, tasks=["mnli"])


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_classifiers_adapter_of_a_language_model_cannot_be_asked_to_generate(data, tmp_path, method):
    few, out = TINY | {"epochs": 1, "limit": 8, "positions": "l16"}, tmp_path / "a"
    if method == "lora":
        few = {name: value for name, value in few.items() if name != "positions"} | {"target_modules": "q_proj"}
    run("train", "glue", *options(data_dir=data, output=out, task="rte", method=method, **few))
    told = r"a: this is a classifier's adapter, for rte; it cannot be asked to generate. To use it, `pyreft eval"
    for command in (
        ("eval", out, "--suite", "commonsense", "--data-dir", data),
        ("generate", "--adapter", out, "--prompt", "a"),
        *([("inspect", out, "--text", "a", "--output", tmp_path / "page")] if method == "loreft" else []),
    ):
        with pytest.raises(ReftError, match=told):
            run(*command)
    (out / "recipe.json").unlink()
    with pytest.raises(ReftError, match=r"a: this is a classifier's adapter; it cannot .* for sequence classification"):
        run("generate", "--adapter", out, "--prompt", "a")


def test_a_language_models_adapter_has_no_classifier(data, commonsense):
    with pytest.raises(ReftError, match="expected an adapter with a trained classifier, this one has none"):
        evaluate(commonsense[0], "glue", data, tasks=["rte"])


def test_a_model_without_a_classifier_in_transformers(tmp_path):
    AutoConfig.for_model("codegen").save_pretrained(tmp_path)
    with pytest.raises(ReftError, match=r"transformers has none for .*, which is a codegen"):
        check_classifier(str(tmp_path))


@pytest.mark.parametrize("suite", ["commonsense", "glue"])
def test_an_adapter_is_checked_before_the_data(data, commonsense, tmp_path, suite):
    adapter = tmp_path / "adapter"
    shutil.copytree(commonsense[0], adapter)
    (adapter / "recipe.json").write_text('{"task": "rte"}')
    tiny_llama(vocab_size=len(pocket.load()[1])).save_pretrained(tmp_path / "base")
    with pytest.raises(ReftError, match=r"does not fit .*base', which has .*hidden_size 32 instead of 192"):
        evaluate(adapter, suite, "none", model=str(tmp_path / "base"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ReftError, match="the file is damaged or was cut short"):
        evaluate(adapter, suite, "none")


def test_the_bar_waits_for_the_checks(data, commonsense):
    arguments = ("eval", commonsense[0], "--suite", "commonsense", "--task", "boolq", "--limit", 1, "--data-dir")
    result = CliRunner().invoke(app, [*map(str, arguments), "none"])
    assert isinstance(result.exception, ReftError)
    assert "Answering" not in result.stderr
    assert "Answering: 1 of 1 questions" in run(*arguments, data).stderr


def test_an_adapter_without_its_base(data, commonsense, tmp_path):
    shutil.copytree(commonsense[0], tmp_path / "moved")
    path = tmp_path / "moved" / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, message in (("/gone/model", "is not there any more"), (None, "does not say what its base model is")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ReftError, match=message):
            evaluate(tmp_path / "moved", "commonsense", data)
    assert evaluate(tmp_path / "moved", "commonsense", data, model="pocket", tasks=["boolq"])["model"] == "pocket"


def test_lora_cannot_be_planned(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "a.yaml").write_text(f"data: {tmp_path}/a.jsonl\nmethod: lora\n")
    with pytest.raises(ReftError, match="method: a plan is of representation edits"):
        run("plan", "--config", tmp_path / "a.yaml")


@pytest.mark.parametrize("setting", ["data: a.jsonl", "task: boolq", "format: chat"])
def test_what_a_suite_decides_is_refused_beside_it(data, tmp_path, setting):
    (tmp_path / "a.yaml").write_text(f"suite: commonsense\n{setting}\n")
    arguments = ("--config", tmp_path / "a.yaml", "--data-dir", data, "--output", tmp_path / "out")
    with pytest.raises(ReftError, match=f"^{setting.split(':')[0]}: the suite commonsense decides it; leave it out"):
        run("train", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", ".", "--suite", "comonsense"), "^suite: expected .*, got 'comonsense'. Did you mean 'commonsense'"),
        (("eval", "no", "--suite", "commonsense", "--data-dir", "DATA"), "no: expected an adapter's directory"),
        (
            ("eval", "no", "--suite", "glue", "--data-dir", "DATA"),
            "no: expected an adapter's directory, there is nothing of",
        ),
        (("train", "commonsense", "--data-dir", "no", "--output", "out"), "data_dir: no is not a directory"),
        (("train", "commonsense", "--data-dir", "DATA", "--output", "out"), "max_length: expected 2 to 256"),
        (("train", "glue", "--task", "rte", "--validation-split", 0.1, "--data-dir", "DATA"), "GLUE has its own"),
        (
            ("train", "--method", "dora", "--data", "a.jsonl", "--output", "out"),
            "method: expected loreft, direft, lora",
        ),
    ],
)
def test_mistakes(data, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReftError, match=message):
        run(*(data if argument == "DATA" else argument for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_prompts_that_leave_no_room_are_left_out_and_long_answers_cut(tmp_path):
    rows = [
        {"instruction": "a " * 60, "output": "b"},
        {"instruction": "a", "output": "b " * 60},
        {"instruction": "a", "output": "b"},
    ]
    suite_data.write_json(tmp_path / "math_10k.json", rows)
    (job,) = recipe_jobs("arithmetic", {"data_dir": tmp_path, "output": tmp_path / "out", **FAST, "max_length": 90})
    prepared = prepare(job)
    assert (prepared.skipped, len(prepared.rows)) == (1, 2)
    assert [len(row["input_ids"]) for row in prepared.rows] == [90, len(prepared.rows[1]["input_ids"])]
    eos = prepared.tokenizer.eos_token_id
    assert [row["input_ids"][-1] == eos for row in prepared.rows] == [False, True]
    job.max_length = 30
    with pytest.raises(ReftError, match="every prompt has 30 tokens or more"):
        prepare(job)


# -- the script of the tables ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["commonsense", "glue"])
def test_the_script_of_the_tables(data, tmp_path, suite):
    changes = {"commonsense": FAST | {"epochs": 1, "limit": 8}, "glue": TINY | {"epochs": 1, "limit": 8}}[suite]
    tasks = {"commonsense": ["boolq", "piqa"], "glue": ["rte", "stsb"]}[suite]
    script = Path(__file__).parents[2] / "benchmarks" / "paper.py"
    command = [sys.executable, script, suite, "--data-dir", data, "--work", tmp_path, "--record", tmp_path / "r.json"]
    command += [
        "--seeds",
        "1",
        "2",
        "--tasks",
        *tasks,
        "--set",
        *(f"{name}={value}" for name, value in changes.items()),
    ]
    command += ["--model", data / "encoder"] if suite == "glue" else []
    for _ in range(2):  # the second time, everything is there
        done = subprocess.run([*map(str, command)], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "r.json").read_text())
        assert [(row["method"], row["seed"]) for row in record["rows"]] == [
            (method, seed) for method in ("LoReFT", "DiReFT", "LoRA") for seed in (1, 2)
        ]
        assert [(mean["method"], mean["task"]) for mean in record["means"]] == [
            (method, task) for method in ("LoReFT", "DiReFT", "LoRA") for task in tasks
        ]
        assert tasks[0] in done.stdout
    assert not any(row["trained"] for row in record["rows"])
