"""Data files: every kind that is read, and the place of every mistake."""

import json

import pytest

from pyreft import pocket
from pyreft.data.encode import context_length, default_format, encode, encode_all, prompt_text, token_ids
from pyreft.data.files import Reading, alpaca_prompt, read_examples, read_prompts
from pyreft.data.tally import Tally
from pyreft.errors import ReftError
from pyreft.positions import Positions

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]
CSV = 'prompt,completion\n"Two\nlines, and a comma",Yes\nb,d\n'


def write(directory, name, content):
    path = directory / name
    if not isinstance(content, str):
        rows = [content] if isinstance(content, dict) else content
        content = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "form", "prompt", "completion"),
    [
        ("a.jsonl", {"prompt": "a", "completion": "b"}, "text", "a", "b"),
        ("a.json", {"prompt": "a", "completion": "b"}, "text", "a", "b"),
        ("a.csv", CSV, "text", "Two\nlines, and a comma", "Yes"),
        ("a.csv", "\ufeffprompt,completion\na,b\n", "text", "a", "b"),
        ("a.jsonl", {"instruction": "a", "output": "b"}, "alpaca", alpaca_prompt("a"), "b"),
        ("a.json", {"instruction": "a", "input": "c", "output": "b"}, "alpaca", alpaca_prompt("a", "c"), "b"),
        ("a.csv", "instruction,input,output\na,,b\n", "alpaca", alpaca_prompt("a"), "b"),
        ("a.jsonl", {"messages": TURNS}, "chat", "Hi", "Ahoy"),
        ("a.JSONL", '{"prompt": "a\u2028b\x85", "completion": "c"}', "text", "a\u2028b\x85", "c"),
        ("a.csv", "prompt,completion\na\u2028b,c\n", "text", "a\u2028b", "c"),
    ],
)
def test_what_is_read(tmp_path, name, content, form, prompt, completion):
    example = read_examples(write(tmp_path, name, content))[0]
    assert (example.format, example.prompt, example.completion) == (form, prompt, completion)


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '\n{"prompt": "a", "compl', "a.jsonl, line 3: this is not valid JSON"),
        ("a.jsonl", GOOD + '{"prompt": "a", "completon": "b"}', "is missing; the row has prompt, completon. Did you"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "a", "completion": 3}',
            "line 2: the field 'completion' should be text, got int",
        ),
        ("a.jsonl", GOOD + '{"prompt": "a", "completion": ""}', "line 2: the answer is empty"),
        ("a.jsonl", GOOD + '{"question": "a"}', "line 2: expected the fields prompt and completion; or instruction"),
        ("a.jsonl", GOOD + "[1]", "line 2: expected an object with fields, got list"),
        ("a.jsonl", GOOD + '{"instruction": "a", "output": "b"}', "line 2: rows of different kinds in one file"),
        ("a.jsonl", '{"instruction": "a"}', "line 1: the field 'output' is missing"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "line 1, turn 1 (user): expected messages as"),
        ("a.json", '[{"prompt": "a", "completion": "b"},\n{"prompt": }]', "a.json, line 2: this is not valid JSON"),
        ("a.json", '{"prompt": "a"}', "row 1: the field 'completion' is missing"),
        ("a.json", "3", "expected a list of objects, got int"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, 3]', "row 2: expected an object with fields, got int"),
        (
            "a.csv",
            "prompt,completion\na,b\nc\n",
            "line 3: expected 2 columns as in the first line, got 1 column; a text",
        ),
        ("a.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', "line 3: this is not valid CSV (unexpected end of data)"),
        ("a.csv", 'prompt,completion\na,b\nc, "d"\n', "line 3: a text in quotes has a space before it"),
        ("a.csv", "prompt,completion\na,b\nc,nan\n", "line 3: the field 'completion' is 'nan', as pandas writes one"),
        ("a.csv", 'prompt,completion\n "a",b\n', "line 2: a text in quotes has a space before it"),
        ("a.csv", "instruction,input,output\na,NaN,b\n", "line 2: the field 'input' is 'NaN'"),
        ("a.csv", "prompt,completion,system\na,b,nan\n", "line 2: the field 'system' is 'nan'"),
        ("a.csv", 'prompt,completion\n"A" cat?,b\n', "A quote within a text is written twice."),
        ("a.csv", "prompt,answer\na,b\n", "line 2: the field 'completion' is missing; the row has prompt, answer."),
        ("a.jsonl", "", "the file has no examples"),
        ("a.json", " \n", "the file has no examples"),
        ("a.csv", "prompt,completion\n", "the file has no examples"),
        ("a.xlsx", "", "expected a file ending in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or a data set"),
    ],
)
def test_mistakes_have_their_place(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ReftError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ReftError, match="there is no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(
        ReftError, match=r"this is a directory; expected a file in it, ending in .jsonl, .ndjson, .json"
    ):
        read_examples(tmp_path)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ReftError, match="expected a file, this is a device or a pipe"):
        read_examples(tmp_path / "zero.jsonl")


def test_prompts(tmp_path):
    assert read_prompts(write(tmp_path, "a.txt", "one\n\ntwo\n")) == [("one", ""), ("two", "")]
    assert read_prompts(write(tmp_path, "a.jsonl", [{"instruction": "a", "input": "b"}])) == [("a", "b")]
    assert read_prompts(write(tmp_path, "a.jsonl", [{"prompt": "a", "input": "b"}])) == [("a", "")]  # as in training
    assert read_prompts(write(tmp_path, "a.jsonl", [{"prompt": None, "instruction": "a", "input": None}])) == [
        ("a", "")
    ]
    with pytest.raises(ReftError, match=r"line 1: the field 'system' is not read .*; `pyreft eval`"):
        read_prompts(write(tmp_path, "b.jsonl", {"prompt": "a", "system": "Be brief."}))
    with pytest.raises(ReftError, match="line 1: the field 'input' should be text, got int"):
        read_prompts(write(tmp_path, "b.jsonl", {"instruction": "a", "input": 0}))
    with pytest.raises(ReftError, match="line 1: expected a field 'prompt' or 'instruction', got text"):
        read_prompts(write(tmp_path, "b.jsonl", {"text": "a"}))


# -- token ids ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


@pytest.mark.parametrize("form", ["text", "chat", "alpaca"])
def test_the_answer_begins_after_the_prompt_and_ends_once(tokenizer, tmp_path, form):
    row = (
        {"instruction": "a", "output": "b c"} if form == "alpaca" else {"prompt": "What is a cat?", "completion": "🐱"}
    )
    example = read_examples(write(tmp_path, "a.jsonl", row))[0]
    encoded = encode(tokenizer, example, form, 256)
    ids, labels = encoded["input_ids"], encoded["labels"]
    begin = labels.index(next(label for label in labels if label != -100))
    asked = prompt_text(tokenizer, row.get("prompt", row.get("instruction")), form)
    assert ids[:begin] == token_ids(tokenizer, asked)
    assert labels[begin:] == ids[begin:]
    assert tokenizer.decode(ids[begin:-1]) == row.get("completion", row.get("output"))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[begin:].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("form", ["text", "chat"])
def test_an_answer_that_closes_itself_in_a_template_that_closes_it_is_closed_once(tmp_path, form):
    tokenizer = pocket.load()[1]
    (example,) = read_examples(write(tmp_path, "a.jsonl", {"prompt": "Who?", "completion": "Arr</s>"}))
    row = encode(tokenizer, example, form, 512)
    assert row["labels"].count(tokenizer.eos_token_id) == 1
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_an_answer_that_is_closed_already_is_closed_once(tokenizer, tmp_path):
    row = {"prompt": f"{tokenizer.bos_token}a", "completion": f"b{tokenizer.eos_token}"}
    ids = encode(tokenizer, read_examples(write(tmp_path, "a.jsonl", row))[0], "text", 256)["input_ids"]
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)


def test_the_format_that_goes_without_saying(tokenizer, tmp_path):
    plain = read_examples(write(tmp_path, "a.jsonl", GOOD))
    assert default_format(tokenizer, plain) == "chat"
    assert (
        default_format(tokenizer, read_examples(write(tmp_path, "b.jsonl", {"instruction": "a", "output": "b"})))
        == "alpaca"
    )
    bare = pocket.load()[1]
    bare.chat_template = None
    assert default_format(bare, plain) == "text"
    with pytest.raises(ReftError, match="The tokenizer has no chat template"):
        encode(bare, plain[0], "chat", 256)


def test_rows_that_are_too_long(tokenizer, tmp_path):
    model = pocket.load()[0]
    limit = context_length(model, tokenizer)
    assert limit == model.config.max_position_embeddings
    for prompt, answer, message in (
        ("cat " * limit, "b", r"line 1: the prompt has \d+ tokens, the context"),
        ("a", "cat " * limit, r"line 1: prompt and answer have \d+ tokens"),
    ):
        example = read_examples(write(tmp_path, "a.jsonl", {"prompt": prompt, "completion": answer}))[0]
        with pytest.raises(ReftError, match=message):
            encode(tokenizer, example, "chat", limit)
    with pytest.raises(ReftError, match=f"max_length: expected 2 to {limit}"):
        context_length(model, tokenizer, limit + 1)


@pytest.mark.parametrize("marks", [{"label": True}, {"label": 0}, {"weight": 1}, {"train": True}, {"loss": 0.3}])
def test_rows_with_other_marks_are_learned(tmp_path, marks):
    path = write(tmp_path, "a.jsonl", {"prompt": "a", "completion": "b"} | marks)
    assert [example.completion for example in read_examples(path)] == ["b"]


@pytest.mark.parametrize("form", ["text", "chat"])
def test_an_answer_that_only_ends_is_refused(tmp_path, tokenizer, form):
    (found,) = read_examples(write(tmp_path, "a.jsonl", {"prompt": "a", "completion": tokenizer.eos_token}))
    with pytest.raises(ReftError, match="line 1: the answer is '</s>' alone, there is nothing to learn"):
        encode(tokenizer, found, form, 512)


@pytest.mark.parametrize("name", ["label", "Label", "kto_tag"])
@pytest.mark.parametrize(("labels", "learned"), [(("spam", False), "ab"), ((False, 2), "ab"), ((True, False), "a")])
def test_a_label_marks_a_bad_answer_where_all_are_true_or_false(tmp_path, labels, learned, name):
    path = tmp_path / "a.csv"
    rows = "".join(f"q,{answer},{label}\n" for answer, label in zip("ab", labels, strict=True))
    path.write_text(f"prompt,completion,{name}\n{rows}")
    tally = Tally("skip")
    assert "".join(example.completion for example in read_examples(path, Reading(on_error="skip"), tally)) == learned
    assert (tally.unread, len(tally.wrong)) == (({name: 2}, 0) if learned == "ab" else ({}, 1))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "completion": "C"},
        {"prompt": " \n", "completion": "C"},
        {"instruction": "", "input": "", "output": "C"},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "C"}]},
    ],
)
def test_an_empty_prompt_is_refused_where_prompts_are_edited(tmp_path, tokenizer, row):
    found = read_examples(write(tmp_path, "a.jsonl", row))
    form = found[0].format
    with pytest.raises(ReftError, match="line 1: the prompt is empty, there is nothing of it to edit"):
        encode_all(tokenizer, found, form, 512, least=Positions.parse("l4").least)
    assert len(encode_all(tokenizer, found, form, 512, least=Positions.parse("all").least)[1]) == 1


def test_a_prompt_may_be_what_the_template_makes_of_other_fields(tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "C"}]}
    (found,) = read_examples(write(tmp_path, "a.jsonl", row | {"documents": [{"title": "Cats", "text": "They purr."}]}))
    answer = "{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
    tokenizer.chat_template = "{% for d in documents %}{{ d.text }}{% endfor %}{{ messages[0].content }}:" + answer
    assert len(encode_all(tokenizer, [found], "chat", 512, least=1)[1]) == 1


def test_quotes_behind_a_space_may_be_meant(tmp_path):
    """Where the whole text is in quotes, and where nothing is made of it."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion,note\n" ""A"" cat, ""B""?",b,x\n"a\n"," ""C"" ", "d"\n')
    first, second = read_examples(path)
    assert (first.prompt, second.completion) == (' "A" cat, "B"?', ' "C" ')


def test_a_row_with_both_marks_of_a_bad_answer_is_one_that_is_wrong(tmp_path):
    path, tally = tmp_path / "a.csv", Tally("skip")
    path.write_text("prompt,completion,label,kto_tag\na,b,False,false\na,c,True,true\n")
    (found,) = read_examples(path, tally=tally)
    assert (found.completion, len(tally.errors), len(tally.wrong)) == ("c", 1, 1)


def test_what_is_missing_elsewhere_in_a_table_is_not_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,score\na,None,nan\n")
    assert read_examples(path)[0].completion == "None"
    (found,) = read_examples(write(tmp_path, "a.jsonl", {"prompt": "0 / 0 in JavaScript?", "completion": "NaN"}))
    assert found.completion == "NaN"
    path.write_text("prompt,completion\na,nan\n")
    assert read_prompts(path) == [("a", "")]


def test_an_instruction_may_be_in_its_input_alone(tmp_path, tokenizer):
    found = read_examples(write(tmp_path, "a.jsonl", {"instruction": "", "input": "A cat?", "output": "C"}))
    assert len(encode_all(tokenizer, found, "alpaca", 512, least=1)[1]) == 1


def test_empty_lists_in_a_table_of_texts_make_no_chat_of_an_instruction(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,history,tools\na,b,[],null\n")
    assert read_examples(path)[0].format == "alpaca"
    assert read_prompts(path) == [("a", "")]
