"""lm-eval's own client of the API, `local-completions`, beside this package's harness."""

import subprocess
import sys

import pytest

from asking import both, close, said, scored
from pyreft import pocket

pytest.importorskip("lm_eval.api.instance")
pytest.importorskip("tenacity", reason="lm-eval's client of APIs is not installed: pip install tenacity")


@pytest.fixture
def asked(running, monkeypatch):
    """Both, by the name of an adapter, none for the base."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    return lambda name: both(running.url, running.root, name)


@pytest.mark.parametrize("name", [None, "l16", "all"])
def test_what_is_said_is_what_the_harness_says(asked, name):
    client, own = asked(name)
    assert said(client) == said(own)


@pytest.mark.parametrize(("name", "same"), [(None, True), ("all", True), ("l4", False)])
def test_given_answers_are_scored_as_prompts_behind_which_there_is_nothing(asked, name, same):
    """So a rule that counts from the prompt's end counts from the answer's, as docs/server.md says."""
    client, own = map(scored, asked(name))
    assert all(close(client, own)) is same
    assert not same or [one[1] for one in client] == [two[1] for two in own]


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
