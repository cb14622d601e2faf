"""Files of any bytes and rows of any values: read, or refused in words; never another error, and never a hang."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyreft import pocket
from pyreft.data.encode import encode
from pyreft.data.files import Reading, read_examples, read_prompts
from pyreft.errors import ReftError
from pyreft.files.adapter import read_config
from pyreft.files.text import read_yaml
from pyreft.jobs.recipes import read_recipe
from pyreft.jobs.settings import TrainingJob, check_settings

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = [
    *("prompt", "completion", "instruction", "input", "output", "messages", "conversations", "system", "history"),
    *("tools", "functions", "documents", "chat_template_kwargs", "images", "Prompt", " completion"),
]
KEYS = [
    *("role", "content", "from", "value", "weight", "train", "tool_calls", "function", "name", "arguments", "type"),
    *("text", "reasoning_content", "function_call"),
]
TEXTS = st.sampled_from(
    ["user", "assistant", "human", "gpt", "function_call", "text", "A cat?", "", "[1]", "{}", "\ud83d"]
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), TEXTS, st.text(max_size=5))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES},
    optional=dict.fromkeys(("weight", "train", "tool_calls", "reasoning_content"), VALUES),
)
ROW = st.dictionaries(st.sampled_from(NAMES), VALUES | st.lists(TURN, max_size=4), max_size=5)


def refused_or(call):
    """What a call returns, none if it refuses in words; any other error comes out."""
    try:
        return call()
    except ReftError:
        return None


@FEW
@given(rows=st.lists(ROW | VALUES, max_size=4), kind=st.sampled_from(["jsonl", "json"]), skip=st.booleans())
def test_rows_of_any_values(tmp_path, rows, kind, skip):
    path = tmp_path / f"a.{kind}"
    path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows), encoding="utf-8")
    found = refused_or(lambda: read_examples(path, Reading(on_error="skip" if skip else "stop")))
    refused_or(lambda: read_prompts(path))
    tokenizer = pocket_tokenizer()
    for example in found or ():
        for form in ("chat", "text"):
            row = refused_or(lambda example=example, form=form: encode(tokenizer, example, form, 10_000))
            if row is not None:
                assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id


@FEW
@given(data=st.binary(max_size=300), ending=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "txt"]))
def test_files_of_any_bytes(tmp_path, data, ending):
    path = tmp_path / f"a.{ending}"
    for content in (data, b"prompt,completion\n" + data, b'{"prompt": "' + data + b'"}', b"\xff\xfe" + data):
        path.write_bytes(content)
        refused_or(lambda: read_examples(path))
        refused_or(lambda: read_prompts(path))


@FEW
@given(
    values=st.dictionaries(
        st.sampled_from(
            ["peft_type", "layers", "positions", "low_rank_dimension", "representations", "dropout", "odd"]
        ),
        VALUES,
        max_size=4,
    )
)
def test_configs_of_any_values(tmp_path, values):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "REFT", **values}))
    refused_or(lambda: read_config(tmp_path))


@FEW
@given(text=st.text(alphabet="abc:- \n\t{}[]!&*|>'\"0123.", max_size=60), value=VALUES)
def test_settings_of_any_values(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    refused_or(lambda: read_yaml(path))
    refused_or(lambda: read_recipe(path))
    for name in ("lr", "epochs", "layers", "turns", "on_error", "long_rows", "limit", "seed", "format", "decoding"):
        settings = {"data": "a.jsonl", "output": "out", name: value}
        refused_or(lambda settings=settings: check_settings(TrainingJob.from_settings(settings, "a.yaml")))


@pytest.mark.parametrize(
    "text", ["a: 2026-13-45", "a: &a [*a]", "a: !!python/object:os.system x", "? [a]\n: b", "[" * 5000]
)
def test_oddities_of_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    refused_or(lambda: yaml_settings(tmp_path / "a.yaml"))


def yaml_settings(path):
    value = read_yaml(path)
    if isinstance(value, dict):
        TrainingJob.from_settings({str(name): held for name, held in value.items()}, str(path))


def test_a_device_behind_a_link(tmp_path):
    for name in ("adapter_config.json", "a.yaml", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"):
        (tmp_path / name).symlink_to("/dev/zero")
    for call in (
        lambda: read_config(tmp_path),
        lambda: read_recipe(tmp_path / "a.yaml"),
        lambda: read_yaml(tmp_path / "a.yaml"),
        *(lambda n=name: read_examples(tmp_path / n) for name in ("a.jsonl", "a.json", "a.csv", "a.parquet")),
        lambda: read_prompts(tmp_path / "a.txt"),
    ):
        with pytest.raises(ReftError):
            call()


_loaded = []


def pocket_tokenizer():
    if not _loaded:
        _loaded.append(pocket.load()[1])
    return _loaded[0]
