"""Text, JSON and YAML that anyone may have written."""

import json
import os

import pytest

from pyreft.data.files import read_examples
from pyreft.errors import ReftError, check_type
from pyreft.files.text import LARGEST, parse_json, read_json, read_text, read_yaml

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000  # digits, of which Python reads 4300


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return json.dumps({"layers": value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "it is not JSON (Expecting ',' delimiter at column 8)"),
        (b'{\n"a": 1', "line 2: the file is damaged, it is not JSON (Expecting ',' delimiter at column 7)"),
        (b"", "the file is damaged, it is not JSON"),
        (b"\xff\xfe{}", "the file is not UTF-8 text"),
        (f'{{"a": {DEEP}}}'.encode(), "it is nested too deeply"),
        (f'{{"a": {LONG}}}'.encode(), "Exceeds the limit"),
        (nested(65).encode(), "layers: the values are nested more than 64 deep"),
        (b"[1]", "expected names and their values, this is a list of values or a single one"),
        (b"3", "expected names and their values"),
        (b'{"layers": [1], "rank": 2, "layers": [2]}', "it is not JSON (the name 'layers' stands there twice)"),
    ],
)
def test_what_is_no_json_is_told_with_its_file(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ReftError) as caught:
        read_json(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + nested(63), encoding="utf-8")  # as editors of Windows write it
    assert list(read_json(path)) == ["layers"]
    assert parse_json("[1, {}]", "here") == [1, {}]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ReftError, match=r"none\.json: there is no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ReftError, match="expected a file, this is a directory"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which would never end
    with pytest.raises(ReftError, match="expected a file, this is a device or a pipe"):
        read_json(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(LARGEST + 1)  # a hole
    with pytest.raises(ReftError, match=f"expected at most {LARGEST:,} bytes, the file has {LARGEST + 1:,}"):
        read_json(tmp_path / "large")
    with pytest.raises(ReftError, match="expected at most 5 bytes"):
        read_text(tmp_path / "large", 5)


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 2024-13-45", "[" * 5000, "a: \t- b", "!!python/object/apply:os.system [ls]", "a: {b: 1, c: 2, b: 3}"],
)
def test_what_is_no_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ReftError, match=r"a.yaml: this is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(("number", "read"), [("010", 8), ("1:30", 90), ("-00_17", -15), ("1:30.5", 90.5)])
def test_numbers_that_yaml_takes_for_others(tmp_path, number, read):
    (tmp_path / "a.yaml").write_text(f"seed: {number}\n")
    with pytest.raises(ReftError, match=f"'{number}' would be read as {read}; write what is meant"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"a: '{number}'\nb: 0\nc: 0.5\nd: 0x10\ne: 1_000\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": number, "b": 0, "c": 0.5, "d": 16, "e": 1000}


def test_what_is_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: [{a: 1}, {a: 2}]\n")
    assert read_yaml(tmp_path / "a.yaml") == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": [{"a": 1}, {"a": 2}]}


@pytest.mark.parametrize("value", [DEEP, LONG])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_data_that_python_cannot_hold(tmp_path, name, value):
    row = f'{{"prompt": "a", "completion": {value}}}'
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    with pytest.raises(ReftError, match="this is not valid JSON"):
        read_examples(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "kinds", "expected"),
    [
        (True, (int,), "a whole number"),
        (True, (float,), "a number"),
        (1, (bool,), "true or false"),
        (float("nan"), (float,), "a number"),
        (float("inf"), (float,), "a number"),
        ("x" * 999, (int, list), "a whole number or a list"),
        (None, (str,), "text"),
        (1.0, (int,), "a whole number"),
    ],
)
def test_values_of_another_type(value, kinds, expected):
    with pytest.raises(ReftError, match=f"^rank: expected {expected}, got .{{1,40}}$"):
        check_type("rank", value, *kinds)


@pytest.mark.parametrize(
    ("value", "kinds"), [(1, (float,)), (1, (int,)), (False, (bool,)), ("", (str,)), ([], (dict, list))]
)
def test_values_of_the_type(value, kinds):
    check_type("rank", value, *kinds)
