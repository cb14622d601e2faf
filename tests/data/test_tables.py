"""Files of every kind: the same rows out of each, whatever wrote them."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pyreft.data.files import Reading, read_examples, read_prompts
from pyreft.data.tables import read_rows
from pyreft.data.tally import Tally
from pyreft.errors import ReftError

ROWS = [{"prompt": "Ü 5–6", "completion": "ja"}, {"prompt": "b", "completion": "c; d"}]
COMMA = 'Prompt, Completion\r\nÜ 5–6,ja\r\nb,"c; d"\r\n'
SEMICOLON = 'prompt;completion\nÜ 5–6;ja\nb;"c; d"\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.csv", COMMA, "utf-8"),
        ("a.csv", COMMA, "utf-8-sig"),
        ("a.csv", "\ufeff" + COMMA.replace("Completion", "Completion\u200b"), "utf-8-sig"),
        ("a.csv", SEMICOLON, "utf-16"),
        ("a.csv", "\n" + SEMICOLON.upper().replace("JA", "ja").replace("B;", "b;").replace("C; D", "c; d"), "utf-8"),
        ("a.tsv", SEMICOLON.replace("n\nÜ", "n\nÜ").replace(";", "\t").replace("c\t d", "c; d"), "utf-8"),
        ("a.jsonl", LINES, "utf-16-le"),
        ("a.jsonl", LINES, "utf-16-be"),
        ("a.ndjson", LINES.replace("\n", "\r\n"), "utf-8"),
        ("a.json", LINES, "utf-8"),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), "utf-32"),
        ("a.json", json.dumps(ROWS), "utf-8-sig"),
        ("a.jsonl", json.dumps(ROWS), "utf-8"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "utf-8"),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), "utf-8"),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), "utf-8-sig"),
        ("a.jsonl", LINES.replace("\n", ""), "utf-8"),
        ("a.jsonl", LINES.replace("\n", ",\n"), "utf-8"),
        ("a.csv", COMMA.replace(",ja", ", ja").replace(',"c', ', "c'), "utf-8"),
        ("a.csv", "sep=;\r\n" + SEMICOLON + ";\n; \n", "utf-8"),
    ],
)
def test_what_programs_write(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert [(e.prompt, e.completion) for e in read_examples(tmp_path / name)] == [("Ü 5–6", "ja"), ("b", "c; d")]


def test_parquet(tmp_path):
    turns = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "tools": None}]), tmp_path / "a.parquet")
    (example,) = read_examples(tmp_path / "a.parquet")
    assert example.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ReftError, match=r"b\.parquet: this is not a readable parquet file"):
        read_examples(tmp_path / "b.parquet")


def test_a_data_set_by_its_name(tmp_path, monkeypatch):
    """As `datasets` finds one: here in a directory of that name, else on the hub."""
    (tmp_path / "mine" / "pairs").mkdir(parents=True)
    (tmp_path / "mine" / "pairs" / "test.jsonl").write_text(LINES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReftError, match="this is a directory"):
        read_examples("mine/pairs")
    from pyreft.data.tables import _hub

    assert [row for _, row in _hub("mine/pairs", None, "test")] == ROWS
    with pytest.raises(ReftError, match="nobody/nothing: there is no such file, and no data set of this name"):
        read_examples("nobody/nothing")


def test_an_encoding_that_cannot_be_told_is_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(SEMICOLON.encode("cp1252"))
    with pytest.raises(ReftError) as caught:
        read_examples(path)
    assert "a.csv, line 2: the file is not UTF-8 text. As cp1252" in str(caught.value)
    assert "Ü 5–6" in str(caught.value)
    assert caught.value.told({"encoding": "--encoding"}).count("give --encoding cp1252") == 1
    assert read_examples(path, Reading(encoding="cp1252"))[0].prompt == "Ü 5–6"
    with pytest.raises(ReftError, match="encoding: expected an encoding such as utf-8, utf-16 or cp1252, got 'cp1'"):
        read_examples(path, Reading(encoding="cp1"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReftError, match="the file is not UTF-16 text"):
        read_examples(path)
    path.write_bytes(b"prompt,completion\na,\x81\n")
    with pytest.raises(ReftError, match="line 2: the file is not UTF-8 text; save it as UTF-8"):
        read_examples(path)


def test_an_encoding_that_the_first_bytes_contradict(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(SEMICOLON.encode("utf-16"))
    assert read_examples(path, Reading(encoding="utf-16-le"))[0].prompt == "Ü 5–6"
    path.write_bytes(("id;" + SEMICOLON.replace("\n", "\n1;", 2)).encode("utf-8-sig"))
    with pytest.raises(ReftError, match=r"encoding: .*a\.csv says by its first bytes that it is UTF-8, got 'cp1252'"):
        read_examples(path, Reading(encoding="cp1252"))


@pytest.mark.parametrize(("begins", "kind"), [(b"\x1f\x8b\x08", "a file of gzip"), (b"PK\x03\x04\x14", "a zip file")])
def test_what_is_packed(tmp_path, begins, kind):
    (tmp_path / "a.csv").write_bytes(begins)
    with pytest.raises(ReftError, match=f"a.csv: expected text, this is {kind}"):
        read_examples(tmp_path / "a.csv")


def test_a_name_that_stands_twice_hides_nothing(tmp_path):
    """Python, PyArrow and `csv` would each take the last of them, and say nothing."""
    texts = {
        "a.jsonl": '{"prompt": "a", "completion": "b", "completion": "c"}',
        "b.json": '[{"prompt": "a", "completion": "b", "completion": "c"}]',
        "c.csv": "prompt,completion,Completion ,completion\na,b,c,d\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    columns = [pyarrow.array([value]) for value in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    for name in (*texts, "d.parquet"):
        with pytest.raises(ReftError, match=r"'completion'.* twice|two columns are called 'completion'"):
            read_examples(tmp_path / name)
    (tmp_path / "e.csv").write_text("PROMPT,Prompt,completion,note,note\na,b,c,d,e\n")
    tally = Tally()
    (found,) = read_examples(tmp_path / "e.csv", tally=tally)
    assert (found.prompt, tally.unread) == ("a", {"Prompt": 1, "note": 1})


def test_a_row_that_holds_lists_is_no_list_of_rows(tmp_path):
    turn = {"role": "user", "content": "a"}
    path = tmp_path / "a.json"
    for row in ({"prompt": [turn], "completion": "b"}, {"prompt": "a", "completion": "b", "tools": [{"name": "x"}]}):
        path.write_text(json.dumps(row))
        (found,) = read_examples(path)
        assert (found.messages[0], found.completion) == (turn, "b")


def test_a_field_of_any_length(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,{'b' * 140_000}\n")
    assert len(read_examples(tmp_path / "a.csv")[0].completion) == 140_000


def test_a_date_that_python_does_not_have(tmp_path):
    late = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a"], "completion": ["b"], "at": late}), tmp_path / "a.parquet"
    )
    with pytest.raises(ReftError, match=r"a\.parquet: this is not a readable parquet file .date"):
        read_examples(tmp_path / "a.parquet")


def test_prompts_have_encodings_and_separators_too(tmp_path):
    (tmp_path / "a.csv").write_bytes(SEMICOLON.encode("utf-16"))
    assert read_prompts(tmp_path / "a.csv")[0] == ("Ü 5–6", "")
    (tmp_path / "a.txt").write_bytes("Ü\r\n\r\nb".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "a.txt") == [("Ü", ""), ("b", "")]


def test_the_first_rows_are_read_and_no_more(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + "no JSON\n", encoding="utf-8")
    assert len(read_examples(path, Reading(limit=2))) == 2
    with pytest.raises(ReftError, match="line 3: this is not valid JSON"):
        list(read_rows(path))


@pytest.mark.parametrize("deep", [70, 900, 100_000])
def test_values_that_are_nested_too_deeply(tmp_path, deep):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "x": ' + "[" * deep + "]" * deep + "}")
    with pytest.raises(ReftError, match=r"line 1: .*nested too deeply"):
        read_examples(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a", "b"], "completion": ["c", "d"]},
        {"prompt": {"0": "a", "7": "b"}, "completion": {"0": "c", "7": "d"}},
        {"messages": [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ("ac", "bd")]},
    ],
)
def test_columns_as_datasets_and_pandas_write_them(tmp_path, columns):
    (tmp_path / "a.json").write_text(json.dumps(columns))
    assert [(e.prompt, e.completion) for e in read_examples(tmp_path / "a.json")] == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    "ragged", [{"prompt": ["a"], "completion": []}, {"prompt": {"0": "a"}, "completion": {"1": "b"}}]
)
def test_columns_that_do_not_fit_are_refused(tmp_path, ragged):
    (tmp_path / "a.json").write_text(json.dumps(ragged))
    with pytest.raises(ReftError, match="row 1: "):
        read_examples(tmp_path / "a.json")


def test_a_row_of_several_lines_stands_where_it_begins(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\n"d\ne\nf",\n')
    assert [where for where, _ in read_rows(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_null_of_a_table_is_told_as_one_of_json(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": pyarrow.array([None], "string")}), path)
    with pytest.raises(ReftError, match="row 1: the field 'completion' is null"):
        read_examples(path)


def test_a_data_set_on_disk_is_read(tmp_path):
    chat = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "C"}]
    rows = datasets.Dataset.from_list([{"messages": chat}] * 2)
    rows.with_format("torch").save_to_disk(tmp_path / "one")
    assert [example.messages for example in read_examples(tmp_path / "one")] == [tuple(chat)] * 2
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    with pytest.raises(ReftError, match=r"several splits; name one of them: .*two/test, .*two/train"):
        read_examples(tmp_path / "two")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(ReftError, match="one: this is not a readable data set of `save_to_disk`"):
        read_examples(tmp_path / "one")


def test_files_put_behind_each_other_have_marks_within(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    assert len(read_examples(path)) == 2


@pytest.mark.parametrize(
    ("begin", "kind"), [(b"BZh9", "bzip2"), (b"\xd0\xcf\x11\xe0", "old Excel"), (b"PAR1", "parquet")]
)
def test_a_packed_file_is_told_by_its_kind(tmp_path, begin, kind):
    (tmp_path / "a.csv").write_bytes(begin + bytes(range(256)))
    with pytest.raises(ReftError, match=f"expected text, this is a .*{kind}.*; unpack it"):
        read_examples(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("begin", "said"),
    [("version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull` brings"), ("\n<!DOCTYPE html>", "a web page")],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_what_was_downloaded_in_place_of_a_file(tmp_path, begin, said, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text(begin)
    with pytest.raises(ReftError, match=said):
        read_examples(path)
