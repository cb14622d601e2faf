"""`pyreft data`, and how the commands tell what is wrong with a file."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import processors

import pyreft
from commands import run
from pyreft import pocket

TURNS = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "C"}]
CHATS = [{"id": number, "messages": TURNS * 2} for number in range(3)]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS) + '{"messages": []}\n')
    return path


def test_what_a_training_would_see(chats):
    found = json.loads(run("data", chats, "--positions", "l2", "--json").stdout)
    assert (found["rows"], found["examples"], found["format"], found["errors"]) == (4, 6, "chat", 1)
    assert found["unread"] == {"id": 3}
    assert "line 4: expected messages as" in found["wrong"]
    where, tokens = found["shown"][0]
    assert where.endswith("chats.jsonl, line 1, turn 2")
    learned = "".join(token["text"] for token in tokens if token["learned"])
    assert learned == "C" + pocket.load()[1].eos_token
    first = next(at for at, token in enumerate(tokens) if token["learned"])
    assert [at for at, token in enumerate(tokens) if token["edited"]] == [first - 2, first - 1]
    assert found["prompts"][0] == first
    assert found["lengths"][0] == len(tokens)


def test_it_reads_well(chats):
    printed = run("data", chats, "--max-length", 5).stdout
    for words in ("4 rows, 6 answers to learn from, written as chat.", "Not read: id (3).", "Wrong: 1 row",
                  "Longer than the 5 tokens that fit", "#", "the tokens that are edited"):  # fmt: skip
        assert words in printed
    assert "line 4: expected messages as" in printed


def test_a_training_says_what_it_does_not_read(tmp_path):
    row = {"id": 1, "messages": [TURNS[0] | {"name": "Ann"}, TURNS[1]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    words = ("--data", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--layers", 6, "--epochs", 1)
    assert "Not read: id (1), name of a turn (1)." in run("train", *words).stdout
    table = tmp_path / "a.csv"
    table.write_text(",prompt,completion\n0,a,b\n", encoding="utf-8")
    assert "Not read: a column without a name (1)." in run("data", table).stdout


@pytest.mark.parametrize("command", ["train", "plan", "data"])
def test_a_wrong_field_is_told_before_anything_is_loaded(tmp_path, command):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completon": "b"}\n')
    given = ["a.jsonl"] if command == "data" else ["--data", "a.jsonl"]
    code = f"""
import sys
from pyreft_cli.app import main
sys.argv = ["pyreft", {command!r}, *{given!r}]
try:
    main()
finally:
    assert not {{"torch", "transformers", "peft", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert (
        "a.jsonl, line 1: the field 'completion' is missing; the row has prompt, completon. Did you mean 'completon'?"
        in done.stderr
    )
    if command == "data":
        assert "the file has no examples that are right" in done.stderr


def test_options_of_a_file_in_a_training(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("Frage;Antwort\nWarum? ;Für\nWo?;\n".encode("cp1252"))
    result = run(
        *("train", "--data", path, "--encoding", "cp1252", "--prompt-field", "Frage", "--completion-field", "Antwort"),
        *("--on-error", "skip", "--epochs", 1, "--output", tmp_path / "out", "--layers", 3, "--positions", "l1"),
    )
    assert "Left out, as wrong: 1 row." in result.stdout
    assert "line 3: the answer is empty" in result.stdout
    assert "1 example, 0 to validate on" in result.stdout


def test_an_adapter_on_held_out_examples(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()[:4]), encoding="utf-8")
    run("train", "--data", path, "--output", tmp_path / "out", "--epochs", 1, "--layers", 3, "--positions", "l1", "-q")
    found = json.loads(run("eval", tmp_path / "out", "--data", path, "--json", "--max-new-tokens", 4).stdout)
    assert found["count"] == 4
    assert found["exact"] == sum(a["answer"] == a["expected"] for a in found["answers"]) / 4
    assert [a["expected"] for a in found["answers"]] == [pair["completion"] for pair in pocket.emoji_pairs()[:4]]
    from pyreft.data.encode import encode
    from pyreft.data.files import read_examples
    from pyreft.loading import load_adapted

    model, tokenizer = load_adapted(tmp_path / "out")
    losses = []
    for example in read_examples(path):
        row = {name: torch.tensor([values]) for name, values in encode(tokenizer, example, "chat", 512).items()}
        count = int((row["labels"] != -100).sum())
        losses += [model(**row).loss.item()] * count
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    printed = run("eval", tmp_path / "out", "--data", path, "--max-new-tokens", 4).stdout
    assert f"expected: {pocket.emoji_pairs()[0]['completion']}" in printed
    assert "% are exactly as expected, loss" in printed
    path = path.with_suffix(".csv")
    path.write_text("Q,A\nWhat is a cat?,🐱\nWhat is a dog?,\n", encoding="utf-16")
    words = (
        "eval",
        tmp_path / "out",
        "--data",
        path,
        "--max-new-tokens",
        4,
        "--prompt-field",
        "Q",
        "--completion-field",
        "A",
    )
    with pytest.raises(pyreft.ReftError, match="line 3: the answer is empty"):
        run(*words)
    printed = run(*words, "--on-error", "skip", "--encoding", "utf-16").stdout
    assert "Left out, as wrong: 1 row." in printed
    assert "1 answer: 0.0 % are exactly as expected, loss" in printed
    path.write_text(f"Q,A\nWhat is a cat?,🐱\n{'cat ' * 400},🐱\n", encoding="utf-8")
    with pytest.raises(pyreft.ReftError, match=r"line 3: the prompt has 4.. tokens, the context 256"):
        run(*words)
    assert "Left out, as too long: 1 row." in run(*words, "--long-rows", "skip").stdout
    found = json.loads(run(*words, "--long-rows", "cut", "--json").stdout)
    assert (found["count"], found["cut"], found["skipped"]) == (2, 1, 0)
    with pytest.raises(
        pyreft.ReftError, match=r"long_rows: expected refuse, cut, skip, got 'cute'. Did you mean 'cut'"
    ):
        run(*words, "--long-rows", "cute")
    assert "--suite has no such option" in run("eval", ".", "--suite", "glue", "--turns", "last", status=2).stderr
    assert "--data has no such option" in run("eval", ".", "--data", path, "--greedy", status=2).stderr
    assert "expected one of the three" in run("eval", ".", status=2).stderr


@pytest.mark.parametrize(("positions", "prompt", "asked"), [("all", "", True), ("l1", "", False), ("l1", "a", True)])
def test_a_prompt_that_is_trained_on_is_one_that_can_be_evaluated(tmp_path, positions, prompt, asked):
    config = pyreft.ReftConfig(layers=[3], positions=positions, prompt_format="text")
    pyreft.get_reft_model(pocket.load()[0], config).save_pretrained(tmp_path / "out")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": "b"}), encoding="utf-8")
    words = ("eval", tmp_path / "out", "--data", path, "--max-new-tokens", 1, "--json")
    if asked:
        assert json.loads(run(*words).stdout)["count"] == 1
    else:
        with pytest.raises(pyreft.ReftError, match="the prompt is empty"):
            run(*words)


@pytest.mark.parametrize("more", [[], [{"prompt": "a b c", "completion": "b"}]])
def test_a_prompt_of_no_token_is_not_asked(tmp_path, more):
    """Beside others it would be answered from padding."""
    model, tokenizer = pocket.load()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    config = pyreft.ReftConfig(layers=[3], positions="all", prompt_format="text")
    pyreft.get_reft_model(model, config).save_pretrained(tmp_path / "out")
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "", "completion": "b"}, *more]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(pyreft.ReftError, match="line 1: the prompt is empty, and the tokenizer begins no text"):
        run("eval", tmp_path / "out", "--data", path, "--model", tmp_path / "base", "--json")
