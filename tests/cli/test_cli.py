"""The commands as a user types them."""

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import typer
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import pyreft
from commands import run
from conftest import FORMULAS, tiny_llama
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.files.adapter import read_config
from pyreft.jobs.settings import TrainingJob
from pyreft.positions import Positions
from pyreft_cli.app import app, as_typed, main
from pyreft_cli.settings import check_positions


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The adapter and the figures of the demo."""
    output = tmp_path_factory.mktemp("demo") / "adapter"
    return output, json.loads(run("demo", "--json", "--output", output).stdout)


def test_the_demo_does_what_it_says(demo):
    output, figures = demo
    assert figures["questions"] == 50
    assert figures["before_in_emojis"] == 0
    assert figures["in_emojis"] >= 45
    assert figures["right"] >= 30
    assert figures["reload_identical"]
    assert figures["bytes"] < 20_000
    assert figures["bytes"] == (output / "adapter_model.safetensors").stat().st_size
    assert figures["parameters"] / figures["model_parameters"] < 0.002
    trained = {pair["prompt"] for pair in pocket.emoji_pairs()}
    assert not trained & {answer["question"] for answer in figures["answers"]}


def test_the_demo_reads_well(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo[0], "pyreft-demo")  # a second run replaces the first
    printed = run("demo").stdout
    for words in ("Trained", "In emojis", "identical", "pyreft chat --adapter pyreft-demo"):
        assert words in printed


def test_the_demo_takes_another_model(tmp_path):
    directory = shutil.copytree(pocket.path(), tmp_path / "model")
    found = json.loads(run("demo", "--model", directory, "--output", tmp_path / "adapter", "--json").stdout)
    assert (found["parameters"], found["before_in_emojis"], found["reload_identical"]) == (5376, 0, True)  # the default
    assert found["in_emojis"] >= 25
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(directory)


def test_generate(demo, tmp_path):
    adapter, figures = demo
    answers = figures["answers"][:3]
    (tmp_path / "prompts.txt").write_text("".join(a["question"] + "\n" for a in answers))
    arguments = ("generate", "--adapter", adapter, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 32)
    found = json.loads(run(*arguments, "--base", "--json", "--batch-size", 2).stdout)
    assert [(r["prompt"], r["base"], r["answer"]) for r in found] == [
        (a["question"], a["before"], a["after"]) for a in answers
    ]
    printed = run("generate", "--adapter", adapter, "--prompt", answers[0]["question"], "--base").stdout
    assert printed == f"base:    {answers[0]['before']}\nadapted: {answers[0]['after']}\n"
    run(*arguments, "--output", tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [a["after"] for a in answers]
    drawn = [run(*arguments, "--temperature", 2, "--seed", 1, "--json").stdout for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("written", ["text", "chat"])
def test_a_lora_to_compare_with_is_asked_as_it_was_trained(tmp_path, written):
    pairs = pocket.emoji_pairs()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    options = ("--method", "lora", "--format", written, "--epochs", 40, "--lr", 0.01)
    printed = run("train", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "lora", *options).stdout
    assert "pyreft generate --adapter" in printed
    prompts = [word for pair in pairs[:4] for word in ("--prompt", pair["prompt"])]
    answers = json.loads(run("generate", "--adapter", tmp_path / "lora", *prompts, "--json").stdout)
    assert [answer["answer"].strip() for answer in answers] == [pair["completion"].strip() for pair in pairs[:4]]
    talk = run("chat", "--adapter", tmp_path / "lora", "--quiet", text=f"{pairs[0]['prompt']}\n").stdout
    assert talk.strip() == pairs[0]["completion"].strip()
    tiny_llama(vocab_size=256).save_pretrained(tmp_path / "other")
    pocket.load()[1].save_pretrained(tmp_path / "other")
    with pytest.raises(pyreft.ReftError, match="lora: the adapter does not fit the base model"):
        run("generate", "--adapter", tmp_path / "lora", "--model", tmp_path / "other", "--prompt", "hi")


def test_chat(demo):
    adapter, figures = demo
    asked = figures["answers"][0]
    printed = run(
        "chat", "--adapter", adapter, text=f"/base\n{asked['question']}\n/base\n/help\n/reset\n/quit\n"
    ).stdout
    assert "There is no message yet." in printed
    assert asked["after"] in printed
    assert f"base: {asked['before']}" in printed
    assert printed.count("/reset forgets the conversation") == 2


def test_half_a_character_is_told_and_ends_no_chat(demo, monkeypatch):
    adapter, figures = demo
    asked = figures["answers"][0]
    monkeypatch.setattr("pyreft_cli.chat.typed", lambda: iter(["K\udce4tzchen", asked["question"]]))
    printed = run("chat", "--adapter", adapter, "--quiet").stdout
    assert "(prompt: half a character, '\\udce4', as of text that is not UTF-8, or" in printed
    assert asked["after"] in printed
    for arguments in (("generate", "--adapter", adapter, "--prompt"), ("info", adapter, "--text")):
        with pytest.raises(ReftError, match="prompt: half a character"):
            run(*arguments, "K\udce4tzchen")


def test_a_chat_longer_than_the_context_forgets_the_oldest_turns(demo):
    text = "Tell me about a cat and a dog and a horse and a whale please.\n" * 14
    printed = run("chat", "--adapter", demo[0], "--quiet", "--max-new-tokens", 16, text=text).stdout
    assert "The context is full: the first 2 turns were forgotten." in printed


def test_a_message_longer_than_the_context_is_told(demo):
    printed = run("chat", "--adapter", demo[0], "--quiet", text=f"{'cat ' * 300}\nWhat is a cat?\n").stdout
    assert "The message has 305 tokens, the model's context 256; shorten it." in printed.replace("\n", " ")
    assert any(pocket.emojis_only(line) for line in printed.splitlines())


def test_info(demo):
    facts = json.loads(run("info", demo[0], "--json", "--text", "What is a cat?").stdout)
    assert facts["parameters"] == demo[1]["parameters"]
    assert facts["base_model"] == "pocket"
    of_a_file = json.loads(run("info", demo[0] / "adapter_config.json", "--json").stdout)
    assert of_a_file == {name: value for name, value in facts.items() if name != "tokens"}
    assert [place["intervention"] for place in facts["places"]] == ["loreft"]
    (rule, tokens), *_ = facts["tokens"]["What is a cat?"].items()
    assert rule == facts["places"][0]["positions"]
    assert tokens[-1] == {"token": "<|assistant|>", "edited": True}
    assert not tokens[0]["edited"]
    texts = [("--text", "What is a cat?"), ("--text", "Where is a whale?")]
    first, second, both = (run("info", demo[0], *given).stdout for given in (*texts, sum(texts, ())))
    assert "[<|assistant|>]" in first
    assert both == first + second[second.index("\nTokens") :]


def test_train_with_a_config_file(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()))
    (tmp_path / "a.yaml").write_text(f"data: {tmp_path}/data.jsonl\nlayers: '3'\npositions: l2\nrank: 2\nepochs: 1\n")
    out = tmp_path / "out"
    printed = run("train", "--config", tmp_path / "a.yaml", "--output", out, "--rank", 3).stdout
    assert "Prompts are wrapped in the tokenizer's chat template" in printed
    assert f"The adapter is in {out}" in printed.replace("\n", "")
    config = read_config(out)
    assert (config.positions, config.low_rank_dimension, config.layers) == ("l2", 3, [3])
    result = json.loads(run("train", "--config", tmp_path / "a.yaml", "--output", out, "--overwrite", "--json").stdout)
    assert result["steps"] == 2


def test_one_is_not_told_as_many(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(pocket.emoji_pairs()[0]) + "\n")
    arguments = ("--data", tmp_path / "data.jsonl", "--epochs", 1)
    printed = run("train", *arguments, "--output", tmp_path / "out").stdout
    assert "\n1 example, 0 to validate on" in printed
    assert "Trained 1 step in" in printed
    prompt = pocket.emoji_pairs()[0]["prompt"]
    assert f"Answers to trained prompts, before and after:\n> {prompt}\n  before: " in printed
    planned = run("plan", *arguments).stdout
    assert planned.startswith("1 row, ")
    assert "1 step in 1 epoch; edits in all layers." in planned
    assert "edits in layer 3." in run("plan", *arguments, "--layers", "3").stdout
    assert "edits in layers 2;3." in run("plan", *arguments, "--layers", "2;3").stdout


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "full"), 2)])
def test_a_training_that_stops_names_its_last_checkpoint(tmp_path, monkeypatch, error, status):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()))

    def stop(*_):
        raise error

    monkeypatch.setattr("pyreft.model.ReftModel.save", stop)
    arguments = ("--data", tmp_path / "data.jsonl", "--layers", 3, "--epochs", 1, "--save-steps", 1)
    result = run("train", *arguments, "--output", tmp_path / "out", status=status)
    assert "interrupted" in result.stderr if status == 130 else "the disk is full" in result.stderr
    assert f"The last checkpoint is {tmp_path / 'out' / 'checkpoints' / 'checkpoint-2'}; go on with" in result.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    monkeypatch.undo()
    printed = run("train", *arguments, "--output", tmp_path / "out", "--epochs", 2, "--resume").stdout
    assert re.search(r"Trained 2 steps in [\d.]+ s after 2 of an earlier run, loss", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--adapter", ".", "--prompt", "a", "--output", "no/such.jsonl"), "no is not a directory"),
        (("train", "--data", "none.jsonl", "--output", "out"), "pyreft: none.jsonl: there is no such file."),
        (("train", "--output", "out"), "pyreft: train: the setting --data is missing."),
        (("train", "--data", "b.jsonl", "--output", ".", "--resume"), "to resume from; leave out --resume to start"),
        (("train", "--data", "a.jsonl", "--output", "out", "--lr", -1), "pyreft: --lr: expected a number above 0"),
        (("train", "--config", "bad.yaml", "--output", "out"), "there is no setting 'ranks'. Did you mean 'rank'?"),
        (("train", "--config", ".", "--output", "out"), "--config: .: expected a file, this is a directory."),
        (("train", "--config", "latin.yaml", "--output", "out"), "latin.yaml is not valid YAML"),
        (("train", "--config", "twice.yaml", "--output", "out"), "twice.yaml has 'batch_size' twice"),
        (("info", "."), "expected an adapter's directory, found no adapter_config.json."),
        (("generate", "--adapter", ".", "--prompt", "a"), "found no adapter_config.json."),
        (("generate", "--adapter", "."), "give a --prompt or a --file of them."),
        (
            ("generate", "--adapter", ".", "--prompt", "a", "--output", "."),
            "--output: expected a file, . is a directory",
        ),
        (("generate", "--adapter", ".", "--file", "a.txt", "--output", "a.txt"), "a.txt has the prompts, which would"),
        (("generate", "--adapter", ".", "--prompt", "a", "--output", "/proc/a"), "--output: /proc/a cannot be written"),
        (("generate", "--adapter", ".", "--file", "a.md"), "a.md: expected a .txt of prompts in lines, or a file"),
        (("train", "b.jsonl", "--output", "out"), "recipe: expected a recipe; give a file of examples as --data b.js"),
        (("train", "--data", "b.jsonl", "--output", "out", "--model", "./no"), "from './no': there is no such directo"),
        (("train", "--data", "b.jsonl", "--output", "out", "--model", "a.md"), "from 'a.md': this is a file; expected"),
        (
            ("train", "--config", "octal.yaml", "--output", "out"),
            "octal.yaml is not valid YAML: '010' would be read",
        ),
        (("trian",), "No such command 'trian'"),
        (("train", "--data", "a.jsonl", "--data", "b.jsonl", "--output", "out"), "--data: it stands there twice"),
        (("generate", "--adapter", ".", "--file", "a.txt", "--file", "b.txt"), "--file: it stands there twice"),
    ],
)
def test_mistakes_end_with_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "bad.yaml").write_text("data: b.jsonl\nranks: 3\n")
    (tmp_path / "latin.yaml").write_bytes("data: é.jsonl\n".encode("latin-1"))
    (tmp_path / "twice.yaml").write_text("data: a.jsonl\nbatch_size: 3\nbatch-size: 2\n")
    (tmp_path / "octal.yaml").write_text("data: b.jsonl\nseed: 010\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_text("a\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pyreft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "rule",
    [
        "f7",
        "l16",
        "F2 + L3",
        "f7+l7",
        "prompt",
        "All",
        None,
        "16",
        "4",
        "last",
        "last3",
        "first2",
        "l2+f1",
        "promt",
        "f",
    ],
)
def test_a_wrong_rule_is_told_as_the_library_does(rule):
    """The command has a check of its own, which must refuse what the library refuses, and nothing else."""
    said = []
    for check in (lambda: check_positions(rule), lambda: Positions.parse(rule or "l1")):
        try:
            check()
            said.append("")
        except (typer.BadParameter, pyreft.ReftError) as error:
            said.append(str(error).removeprefix("positions: ").partition(" got ")[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_wrong_rule_is_told_before_anything_is_loaded(tmp_path, command):
    (tmp_path / "a.yaml").write_text("positions: 16\n")
    code = f"""
import sys
from pyreft_cli.app import app
for given in (["--positions", "16"], ["--config", {str(tmp_path / "a.yaml")!r}]):
    try:
        app([{command!r}, "--data", "a.jsonl", *given])
    except SystemExit:
        assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    message = "--positions: expected f<n>, l<n>, f<n>+l<m>, prompt or all, got '16'. Did you mean 'l16'?"
    assert words.count(message) == 2


def test_info_says_whether_an_adapter_fits_a_base_model(demo, tmp_path):
    assert "Fits         pocket\n" in run("info", demo[0], "--model", "pocket").stdout
    assert json.loads(run("info", demo[0], "--model", pocket.path(), "--json").stdout)["fits"] == pocket.path()
    tiny_llama().save_pretrained(tmp_path / "other")
    message = "the adapter does not fit .*other', which has hidden_size 32 instead of 192, num_hidden_layers 4 instead"
    with pytest.raises(pyreft.ReftError, match=message):
        run("info", demo[0], "--model", tmp_path / "other")
    with pytest.raises(pyreft.ReftError, match="model: none could be loaded from 'no/where'"):
        run("info", demo[0], "--model", "no/where")


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (
            BertConfig(vocab_size=9, hidden_size=32, num_attention_heads=2, num_hidden_layers=2),
            BertForSequenceClassification,
        ),
        (T5Config(vocab_size=9, d_model=32, num_layers=2), T5ForConditionalGeneration),
    ],
)
def test_info_knows_other_kinds_of_base_models(tmp_path, base, kind):
    model = kind(base)
    model.save_pretrained(tmp_path / "base")
    component = "encoder.block_output" if base.is_encoder_decoder else "block_output"
    config = pyreft.ReftConfig(layers=1, component=component, positions="f1", low_rank_dimension=2)
    pyreft.get_reft_model(model, config).save(tmp_path / "adapter")
    assert "Fits" in run("info", tmp_path / "adapter", "--model", tmp_path / "base").stdout


def test_the_help_says_that_pictures_need_matplotlib():
    assert 'need matplotlib: pip install "pyreft[plot]"' in " ".join(run("inspect", "--help").stdout.split())


def test_the_help_names_every_formula():
    (option,) = (o for o in typer.main.get_command(app).commands["train"].params if o.name == "intervention")
    named = re.match(r"The formula of the edit: (.*)\.  \[default", option.help)[1]
    assert re.split(", | or ", named.removesuffix(", which is LoRA at these tokens alone")) == FORMULAS


def test_a_config_file_takes_the_options_above_it():
    names = [option.name for option in typer.main.get_command(app).commands["train"].params if option.name != "recipe"]
    above = names[: names.index("config")]
    assert set(above) <= {field.name for field in fields(TrainingJob)}
    assert "any of the options above" in " ".join(run("train", "--help").stdout.split())


@pytest.mark.parametrize(
    ("command", "error", "typed"),
    [
        ("train", ReftError("expected f<n>.", setting="positions"), "--positions: expected f<n>."),
        ("train", ReftError("9 tokens.", setting="max_length"), "--max-length: 9 tokens."),
        ("train", ReftError("expected a rank.", setting="low_rank_dimension"), "--rank: expected a rank."),
        ("train", ReftError("there are 0 to 6.", setting="layer"), "--layers: there are 0 to 6."),
        ("plan", ReftError("expected 4GB.", setting="memory"), "--reach-memory: expected 4GB."),
        ("train", ReftError("pass `resume`.", where="out", also=["resume"]), "out: pass --resume."),
        ("train", ReftError("expected a number.", setting="lr", where="train"), "train: --lr: expected a number."),
        ("train", ReftError("'output' is missing.", where="train", also=["output"]), "train: --output is missing."),
        ("eval", ReftError("expected a.", setting="suite"), "--suite: expected a."),
        ("demo", ReftError("expected f<n>.", setting="positions"), "positions: expected f<n>."),  # no such option
        ("eval", ReftError("an argument.", setting="adapter"), "adapter: an argument."),
        ("train", ReftError("in a file.", setting="lr", where="a.yaml"), "a.yaml: lr: in a file."),
        ("train", ReftError("out: there is nothing there."), "out: there is nothing there."),
        ("train", ReftError("data: the file of that name."), "data: the file of that name."),
        ("train", ReftError("`pip install data`, or `lr`."), "`pip install data`, or `lr`."),
    ],
)
def test_messages_name_options_as_they_are_typed(command, error, typed):
    assert as_typed(error, command) == typed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", ".", "--suite", "commonsense", "--max-new-tokens", 0), "Invalid value for '--max-new-tokens'"),
        (("eval", ".", "--suite", "commonsense", "--seed", -1), "Invalid value for '--seed'"),
        (("generate", "--adapter", ".", "--prompt", "a", "--seed", -1), "Invalid value for '--seed'"),
        (("generate", "--adapter", ".", "--prompt", "a", "--seed", 2**32), "Invalid value for '--seed'"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    assert message in run(*arguments, status=2).stderr


def test_the_version():
    assert run("--version").stdout.strip() == pyreft.__version__


def test_help_loads_nothing_heavy():
    code = "import sys, pyreft_cli.app; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    printed = run("--help").stdout
    assert "Representation finetuning (ReFT): adapt a frozen" in printed
    for name in ("demo", "train", "plan", "eval", "generate", "chat", "info", "inspect"):
        assert f"  {name} " in printed
