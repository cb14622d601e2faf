"""lm-eval's own client of the API, `local-completions`, beside this package's harness."""

import subprocess
import sys

import pytest

import pyreft
from pyreft import pocket
from pyreft.harness import ReftLM

lm_eval_instance = pytest.importorskip("lm_eval.api.instance")
pytest.importorskip("tenacity", reason="lm-eval's client of APIs is not installed: pip install tenacity")

QUESTIONS = [pocket.PROMPT_TEMPLATE % row["prompt"] for row in pocket.emoji_questions()[:4]]
PAIRS = [(question, answer) for question in QUESTIONS for answer in (" A whale is large.", " 🐳")]
UNTIL = {"until": ["</s>", "."], "max_gen_toks": 12, "do_sample": False}


def requests(kind, arguments):
    return [
        lm_eval_instance.Instance(request_type=kind, doc={}, arguments=pair, idx=n) for n, pair in enumerate(arguments)
    ]


@pytest.fixture
def asked(running, monkeypatch):
    """Both, by the name of an adapter, none for the base."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def make(name):
        model, tokenizer = pocket.load()
        if name is not None:
            model = pyreft.ReftModel.from_pretrained(model, str(running.root / name)).eval()
        client = LocalCompletionsAPI(
            model=name or "pocket",
            base_url=f"{running.url}/v1/completions",
            tokenizer=pocket.path(),
            tokenizer_backend="huggingface",
            add_bos_token=True,
            batch_size=4,
        )
        return client, (HFLM if name is None else ReftLM)(pretrained=model, tokenizer=tokenizer)

    return make


@pytest.mark.parametrize("name", [None, "l16", "all"])
def test_what_is_said_is_what_the_harness_says(asked, name):
    client, own = asked(name)
    given = [(question, UNTIL) for question in QUESTIONS]
    found = [lm.generate_until(requests("generate_until", given), disable_tqdm=True) for lm in (client, own)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "same"), [(None, True), ("all", True), ("l4", False)])
def test_given_answers_are_scored_as_prompts_behind_which_there_is_nothing(asked, name, same):
    """So a rule that counts from the prompt's end counts from the answer's, as docs/server.md says."""
    client, own = asked(name)
    found = [lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for lm in (client, own)]
    close = [one[0] == pytest.approx(two[0], rel=1e-3) for one, two in zip(*found, strict=True)]
    assert all(close) is same
    assert not same or [one[1] for one in found[0]] == [two[1] for two in found[1]]


@pytest.mark.slow  # lm-eval reads all its tasks
def test_a_task_by_lm_evals_command_line(running, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is a whale?", "answer": "large"}\n')
    (tmp_path / "said.yaml").write_text(
        f"task: said\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\ntest_split: train\n"
        'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["</s>"]\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n'
    )
    arguments = f"model=l4,base_url={running.url}/v1/completions,tokenizer={pocket.path()},add_bos_token=True"
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    words += ["--tasks", "said", "--include_path", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|said|" in done.stdout.replace(" ", "")
