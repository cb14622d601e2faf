"""lm-eval on adapted models: a continuation is scored behind edits at the end of its context."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import pyreft
from conftest import shaken
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.generation import generate_answers
from pyreft.harness import ReftLM, evaluate
from pyreft_cli.app import app

lm_eval_instance = pytest.importorskip("lm_eval.api.instance")

TASK = """task: emoji_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[words, emojis]}}}}"
doc_to_target: 1
target_delimiter: ""
metric_list:
  - metric: acc
"""
SAID = """task: emoji_said
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{emojis}}}}"
generation_kwargs:
  until: ["</s>"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


def adapted(rule, **changes):
    torch.manual_seed(0)
    config = pyreft.ReftConfig(
        positions=rule, low_rank_dimension=2, layers=[1, 2], **{"intervention": "loreft"} | changes
    )
    return shaken(pyreft.get_reft_model(pocket.load()[0], config))


@pytest.fixture(scope="module")
def emoji_adapter(tmp_path_factory):
    """An adapter that answers in emojis."""
    from pyreft.jobs.job import PreparedJob
    from pyreft.jobs.settings import TrainingJob

    directory = tmp_path_factory.mktemp("harness")
    data = directory / "train.jsonl"
    data.write_text("\n".join(json.dumps(pair) for pair in pocket.emoji_pairs()), encoding="utf-8")
    settings = {"layers": "1;2;3", "positions": "l4", "rank": 4, "lr": 0.01, "epochs": 50, "batch_size": 10}
    PreparedJob(TrainingJob(data=str(data), output=str(directory / "adapter"), **settings)).train()
    return directory / "adapter"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Twenty unseen questions: which answer is likelier, and what the model says."""
    directory = tmp_path_factory.mktemp("tasks")
    file = directory / "questions.json"
    questions = pocket.emoji_questions()[:20]
    prompts = [pocket.PROMPT_TEMPLATE % row["prompt"] for row in questions]
    words = generate_answers(*pocket.load(), prompts)
    rows = [
        {"prompt": prompt, "emojis": row["answer"], "words": said}
        for prompt, row, said in zip(prompts, questions, words, strict=True)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    for name, task in (("choice", TASK), ("said", SAID)):
        (directory / f"{name}.yaml").write_text(task.format(file=file), encoding="utf-8")
    return directory


def requests(kind, arguments):
    return [
        lm_eval_instance.Instance(request_type=kind, doc={}, arguments=pair, idx=n) for n, pair in enumerate(arguments)
    ]


PAIRS = [  # of different lengths; some share context and continuation but for the last token, or only their text
    ("What is a whale?", " A whale is large."),
    ("What is a whale? A", " whale is large."),
    ("What is", " a"),
    ("What is", " the"),
    ("What", " is the"),
    ("Where can I find an oak tree in the woods?", " You can find it"),
]


@pytest.mark.parametrize("rule", ["l1", "l2", "f1+l2", "prompt", "all"])
def test_each_continuation_is_scored_as_with_labels(rule, tokenizer):
    """Batched and padded as alone, where the labels tell where the prompt ends."""
    model = adapted(rule)
    lm = ReftLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    scores = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, scores, strict=True):
        first, second = lm._encode_pair(context, continuation)
        ids = torch.tensor([first + second])
        labels = torch.tensor([[-100] * len(first) + second])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        assert score == pytest.approx(-float(output.loss) * len(second), rel=1e-4)
        said = output.logits[0, len(first) - 1 : -1].argmax(-1).tolist()
        assert greedy is (said == second)


def test_a_context_that_is_too_long_loses_its_beginning(tokenizer):
    model = adapted("l1")
    lm = ReftLM(pretrained=model, tokenizer=tokenizer, max_length=8)
    context, continuation = list(range(20, 34)), [40, 41, 42]
    [(score, _)] = lm._loglikelihood_tokens([((None, None), context, continuation)], disable_tqdm=True)
    ids = torch.tensor([(context + continuation)[-9:]])
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    with torch.no_grad():
        assert score == pytest.approx(-3 * float(model(input_ids=ids, labels=labels).loss), rel=1e-4)


def test_the_batch_size_may_be_found(tokenizer):
    lm = ReftLM(pretrained=adapted("l1"), tokenizer=tokenizer, batch_size="auto", max_batch_size=4)
    fixed = ReftLM(pretrained=adapted("l1"), tokenizer=tokenizer, batch_size=1)
    found = [m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (lm, fixed)]
    assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in found[1]], rel=1e-4)


def test_texts_are_scored_token_by_token(tokenizer):
    """A rolling log-likelihood has the beginning token as its context; edits of it are seen by the rest."""
    model = adapted("all")
    lm = ReftLM(pretrained=model, tokenizer=tokenizer)
    text = "A whale is large."
    [total] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
    with torch.no_grad():
        expected = -float(model(input_ids=ids, labels=ids.clone()).loss) * (ids.shape[1] - 1)
    assert total == pytest.approx(expected, rel=1e-4)


def test_rules_without_an_end_of_the_prompt_need_no_help(tokenizer):
    """lm-eval's own model serves rules that do not ask where the prompt ends."""
    from lm_eval.models.huggingface import HFLM

    for rule, same in (("f1", True), ("all", True), ("l1", False)):
        asked = requests("loglikelihood", PAIRS)
        theirs = HFLM(pretrained=adapted(rule), tokenizer=tokenizer, logits_cache=False)
        own = theirs.loglikelihood(asked, disable_tqdm=True)
        ours = ReftLM(pretrained=adapted(rule), tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)
        close = [one[0] == pytest.approx(other[0], rel=1e-4) for one, other in zip(own, ours, strict=True)]
        assert all(close) is same


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tasks_run_on_an_adapter(emoji_adapter, tasks):
    """The base model prefers words and says no emojis; the adapter turns both."""
    results = evaluate(emoji_adapter, ["emoji_choice", "emoji_said"], include_path=tasks, bootstrap_iters=0)["results"]
    assert results["emoji_choice"]["acc,none"] > 0.9
    assert results["emoji_said"]["exact_match,none"] > 0.3
    model = pyreft.ReftModel.load(emoji_adapter, pocket.load()[0])
    model.set_strength("default", 0)
    tokenizer = pocket.load()[1]
    results = evaluate(
        model, ["emoji_choice", "emoji_said"], tokenizer=tokenizer, include_path=tasks, bootstrap_iters=0
    )
    assert results["results"]["emoji_choice"]["acc,none"] < 0.5
    assert results["results"]["emoji_said"]["exact_match,none"] == 0


@pytest.mark.slow  # lm-eval reads all its tasks
def test_lm_evals_own_command_line(emoji_adapter, tasks):
    command = [sys.executable, "-m", "pyreft.harness", "run", "--model", "reft", "--tasks", "emoji_choice"]
    command += ["--model_args", f"adapter={emoji_adapter}", "--include_path", str(tasks), "--limit", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|emoji_choice|" in done.stdout.replace(" ", "")


@pytest.mark.slow  # lm-eval reads all its tasks
def test_an_adapter_that_is_not_there_is_told_in_a_line(tasks):
    command = [sys.executable, "-m", "pyreft.harness", "run", "--model", "reft", "--tasks", "emoji_choice"]
    command += ["--model_args", "adapter=nope", "--include_path", str(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pyreft: nope: expected an adapter's directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["pyreft/there-is-none", "json"])
def test_data_that_cannot_be_loaded_is_told(emoji_adapter, tmp_path, monkeypatch, place):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    task = TASK.format(file=tmp_path / "gone.jsonl").replace("dataset_path: json", f"dataset_path: {place}")
    (tmp_path / "task.yaml").write_text(task)
    with pytest.raises(ReftError, match=r"^tasks: lm-eval could not load the data of emoji_choice \(.+\)\.$"):
        evaluate(emoji_adapter, ["emoji_choice"], include_path=tmp_path)


def test_what_cannot_be_evaluated_says_so(tokenizer, tasks):
    with pytest.raises(ReftError, match="expected adapter=<directory>, or an adapted model, got None"):
        ReftLM()
    with pytest.raises(ReftError, match="expected a causal language model with edits, got LlamaForCausalLM without"):
        ReftLM(pretrained=pocket.load()[0], tokenizer=tokenizer)
    with pytest.raises(ReftError, match="include_path: expected a directory of tasks"):
        evaluate(adapted("l1"), ["emoji_choice"], tokenizer=tokenizer, include_path=tasks / "gone")


@pytest.mark.slow  # lm-eval reads all its tasks
def test_an_unknown_task_says_so(tokenizer, tasks):
    with pytest.raises(ReftError, match="lm-eval has none of the name 'emoji_chioce'"):
        evaluate(adapted("l1"), ["emoji_chioce"], tokenizer=tokenizer, include_path=tasks)


def test_the_command(emoji_adapter, tasks):
    given = ["eval", str(emoji_adapter), "--tasks", "emoji_choice", "--include-path", str(tasks), "--limit", "4"]
    shown = CliRunner().invoke(app, given)
    row = next(line for line in shown.output.splitlines() if "emoji_choice" in line)
    assert {"acc", "1.0000"} <= set(row.replace("│", " ").split())
    assert json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)["emoji_choice"]["acc"] == 1
    quiet = CliRunner().invoke(app, [*given, "--quiet"])
    assert (quiet.stderr, "1.0000" in quiet.stdout) == ("", True)
    with pytest.raises(ReftError, match="dtype: expected auto, float32"):
        CliRunner().invoke(app, [*given, "--dtype", "float23"], catch_exceptions=False)
    for other in (["--seed", "42"], ["--greedy"], ["--task", "a"], ["--data-dir", "."], ["--max-new-tokens", "3"]):
        result = CliRunner().invoke(app, [*given, *other])
        assert result.exit_code == 2
        assert f"{other[0]}: --tasks has no such option; leave it out." in result.output
    result = CliRunner().invoke(app, ["eval", str(emoji_adapter), "--suite", "commonsense", "--include-path", "."])
    assert "--include-path: --suite has no such option; leave it out." in result.output
    for both_or_none in ([], ["--tasks", "piqa", "--suite", "glue"]):
        result = CliRunner().invoke(app, ["eval", str(emoji_adapter), *both_or_none])
        assert result.exit_code == 2
        assert "expected one of the three" in result.output
