"""The forms of rows that people have: each gives the same turns, and nothing that a row says is dropped in silence."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pyreft import pocket
from pyreft.data.encode import default_format, encode, encode_all, prompt_text
from pyreft.data.fields import alpaca_prompt
from pyreft.data.files import Reading, read_examples
from pyreft.data.tally import Tally
from pyreft.errors import ReftError
from pyreft.positions import Positions

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + ((m['tool_calls'] | tojson) if m['tool_calls'] else '') + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "C"}
MORE = [USER, ANSWER, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
NUMBERS = {"function": {"name": "weather", "arguments": {"days": 3, "places": ["Oslo"]}}}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def tokenizer_with(template):
    tokenizer = pocket.load()[1]
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(TEMPLATE)


def examples(tmp_path, *rows, **reading):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_examples(path, Reading(**reading))


def parts(tokenizer, example, form="chat"):
    """The prompt and the answer that training sees, as text."""
    row = encode(tokenizer, example, form, 512)
    begin = next(at for at, label in enumerate(row["labels"]) if label != -100)
    assert row["labels"][begin:] == row["input_ids"][begin:]
    prompt, answer = row["input_ids"][:begin], row["labels"][begin:]
    return tokenizer.decode(prompt).removeprefix("<s>"), tokenizer.decode(answer).removesuffix("</s>")


# -- several turns ------------------------------------------------------------------------------------------------


def test_each_answer_of_a_chat_is_learned_behind_what_comes_before_it(tmp_path, tokenizer):
    assert [parts(tokenizer, example) for example in examples(tmp_path, {"messages": MORE})] == [
        ("<|user|>A cat?</s><|assistant|>", "C"),
        ("<|user|>A cat?</s><|assistant|>C</s><|user|>Why?</s><|assistant|>", "So."),
    ]
    (last,) = examples(tmp_path, {"messages": MORE}, turns="last")
    assert parts(tokenizer, last)[1] == "So."


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_an_answer_may_be_left_out_of_what_is_learned(tmp_path, tokenizer, mark):
    (found,) = examples(tmp_path, {"messages": [USER, ANSWER | mark, *MORE[2:]]})
    assert parts(tokenizer, found) == ("<|user|>A cat?</s><|assistant|>C</s><|user|>Why?</s><|assistant|>", "So.")
    (found,) = examples(tmp_path, {"messages": [*MORE[:3], MORE[3] | mark]})
    assert parts(tokenizer, found)[1] == "C"


# -- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "A cat?"}, {"from": "gpt", "value": "C"}]},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"from": "human", "value": "A cat?"}, {"from": "gpt", "value": "C"}]},
        {"Messages": [USER, ANSWER], "id": 3},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "C"},
        {"prompt": "A cat?", "completion": [ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat?"}]},
                      ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER | {"role": "Human"}, ANSWER | {"role": "gpt"}]},
        {"messages": [USER | {"role": "User "}, ANSWER | {"role": "ASSISTANT", "value": "C"}]},
        {"messages": [USER, ANSWER | {"refusal": None, "train_detail": None}]},
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "C"}]},
        {"conversations": [{"from": "Human", "value": "A cat?"}, {"from": "GPT", "value": "C"}]},
        {"prompt": "ignored", "messages": [USER, ANSWER]},
    ],
)  # fmt: skip
def test_chats(tmp_path, tokenizer, row):
    (found,) = examples(tmp_path, row)
    assert found.format == "chat"
    assert parts(tokenizer, found) == ("<|user|>A cat?</s><|assistant|>", "C")


def test_the_turns_of_a_prompt_are_not_learned(tmp_path, tokenizer):
    (found,) = examples(tmp_path, {"prompt": MORE[:3], "completion": MORE[3:]})
    assert parts(tokenizer, found)[1] == "So."


@pytest.mark.parametrize("prompt", [[USER], "A cat?", MORE[:3]])
def test_a_completion_that_holds_its_prompt_says_it_once(tmp_path, tokenizer, prompt):
    asked = prompt if isinstance(prompt, list) else [USER]
    told = [{"role": "system", "content": "Be brief."}]
    for before in ([], told):
        row = {"prompt": prompt, "chosen": [*before, *asked, ANSWER]}
        (found,) = examples(tmp_path, row, completion_field="chosen")
        (same,) = examples(tmp_path, {"prompt": [*before, *asked], "completion": [ANSWER]})
        assert parts(tokenizer, found) == parts(tokenizer, same)
    for before in ([], told):
        (found,) = examples(tmp_path, {"prompt": [*told, *asked], "completion": [*before, *asked, ANSWER]})
        (same,) = examples(tmp_path, {"prompt": [*told, *asked], "completion": [ANSWER]})
        assert parts(tokenizer, found) == parts(tokenizer, same)


def test_a_system_text_by_its_other_names(tmp_path):
    plain = {"prompt": "A cat?", "completion": "C"}
    told = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    path = tmp_path / "data.jsonl"
    for name in ("system", "system_prompt", "System_Prompt", "system_message"):
        for row in (plain, {"messages": [USER, ANSWER]}, {"messages": told}):
            path.write_text(json.dumps({**row, name: "Be brief."}), encoding="utf-8")
            tally = Tally("stop")
            (example,) = read_examples(path, Reading(), tally)
            assert [dict(turn) for turn in example.messages] == told
            assert not tally.unread
    null, named = {"system": None}, {"system_prompt": "Be brief."}
    for row in ({**plain, **null, **named}, {**named, **null, **plain}):
        path.write_text(json.dumps(row), encoding="utf-8")
        (example,) = read_examples(path, Reading(), Tally("stop"))
        assert [dict(turn) for turn in example.messages] == told


def test_an_instruction_with_a_system_text_and_a_history(tmp_path, tokenizer):
    row = {"instruction": "Say", "input": "it", "output": "C", "system": "Be brief.", "history": [["A?", "B"]]}
    plain = {"instruction": "A cat?", "output": "C", "system": "", "history": []}
    found = examples(tmp_path, row, plain)
    assert [example.format for example in found] == ["chat", "chat"]
    assert parts(tokenizer, found[0]) == (
        "<|system|>Be brief.</s><|user|>A?</s><|assistant|>B</s><|user|>Say\n\nit</s><|assistant|>",
        "C",
    )
    assert parts(tokenizer, found[1]) == ("<|user|>A cat?</s><|assistant|>", "C")
    with pytest.raises(ReftError, match=r"line 1: a chat with 5 turns cannot be written as 'alpaca'"):
        encode(tokenizer, found[0], "alpaca", 512)


def test_two_columns_of_any_names(tmp_path, tokenizer):
    (found,) = examples(tmp_path, {"Q": "a ", "A": "b"}, prompt_field="Q", completion_field="A")
    assert parts(tokenizer, found, "text") == ("a ", "b")
    with pytest.raises(ReftError, match="completion_field: expected another column than that of the prompts, got 'Q'"):
        examples(tmp_path, {"Q": "a ", "A": "b"}, prompt_field="Q", completion_field="Q")
    with pytest.raises(ReftError, match="line 1: the field 'B' is missing"):
        examples(tmp_path, {"Q": "a ", "A": "b"}, prompt_field="Q", completion_field="B")


@pytest.mark.parametrize("fields", [{}, {"prompt_field": "instruction"}])
def test_one_column_of_another_name(tmp_path, fields):
    """The other one is found by itself, and an instruction keeps its further input."""
    (found,) = examples(tmp_path, {"Instruction": "a", "Input": "b", "response": "c"}, completion_field="response")
    assert (found.format, found.messages[0]["content"], found.given, found.completion) == ("alpaca", "a", "b", "c")
    (found,) = examples(tmp_path, {"prompt": "a", "response": "c"}, completion_field="response")
    assert (found.format, found.prompt, found.completion) == ("text", "a", "c")
    (found,) = examples(tmp_path, {"question": "a", "completion": "c"}, prompt_field="question")
    assert (found.format, found.prompt, found.completion) == ("text", "a", "c")
    row = {"instruction": "a", "input": "b", "response": "c"}
    (found,) = examples(tmp_path, row, completion_field="response", **fields)
    assert (found.format, found.given) == ("alpaca", "b")
    (found,) = examples(tmp_path, {"instruction": "a", "input": "b"}, completion_field="input")
    assert (found.given, found.completion) == ("", "b")
    with pytest.raises(ReftError, match=r"line 1: the field 'prompt' is missing; the row has prompt, x. Another name"):
        examples(tmp_path, {"prompt": "a", "x": "b"}, completion_field="prompt")
    with pytest.raises(ReftError, match=r"line 1: the field 'completion' is missing; .* given by `completion_field`"):
        examples(tmp_path, {"completion": "a", "x": "b"}, prompt_field="completion")


@pytest.mark.parametrize("form", ["text", "chat", "alpaca"])
def test_an_instruction_is_trained_as_it_is_asked_in_each_format(tmp_path, form):
    tokenizer = pocket.load()[1]
    (found,) = examples(tmp_path, {"instruction": "a", "input": "b", "output": "c"})
    from pyreft.data.encode import prompt_text, token_ids

    row = encode(tokenizer, found, form, 512)
    asked = token_ids(tokenizer, prompt_text(tokenizer, "a", form, "b"))
    assert row["input_ids"][: row["labels"].count(-100)] == asked
    assert found.prompt == alpaca_prompt("a", "b")


# -- what a row says beside its turns -----------------------------------------------------------------------------


def test_calls_of_tools_are_given_to_the_template(tmp_path, tokenizer):
    first, second = examples(tmp_path, {"messages": CALLED, "tools": TOOLS})
    prompt, answer = parts(tokenizer, first)
    assert prompt.startswith('[{"type": "function", "function": {"name": "weather", "parameters": {}}}]<|user|>')
    assert json.loads(answer) == [CALL]
    assert parts(tokenizer, second)[1] == "It rains."
    as_text = [
        CALLED[0],
        CALLED[1] | {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
    ]
    (found,) = examples(tmp_path, {"messages": as_text})
    assert json.loads(parts(tokenizer, found)[1]) == [CALL]
    as_llama = [CALLED[0], {"role": "assistant", "tool_calls": [{"name": "weather", "parameters": {"city": "Oslo"}}]}]
    (found,) = examples(tmp_path, {"messages": as_llama})
    assert json.loads(parts(tokenizer, found)[1]) == [CALL]
    as_llama[1]["tool_calls"][0] |= {"arguments": None, "description": ""}
    (found,) = examples(tmp_path, {"messages": as_llama})
    assert json.loads(parts(tokenizer, found)[1]) == [CALL]
    for nothing in (None, "", {}):
        bare = {"type": "function", "function": {"name": "weather", "arguments": nothing}}
        (found,) = examples(tmp_path, {"messages": [CALLED[0], {"role": "assistant", "tool_calls": [bare]}]})
        assert json.loads(parts(tokenizer, found)[1])[0]["function"] == {"name": "weather", "arguments": {}}
    sharegpt = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ]
    (found,) = examples(tmp_path, {"conversations": sharegpt, "system": "Be brief.", "tools": json.dumps(TOOLS)})
    prompt, answer = parts(tokenizer, found)
    assert "<|system|>Be brief." in prompt
    assert json.loads(answer) == [CALL]
    sharegpt[1] = {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}
    (found,) = examples(tmp_path, {"conversations": sharegpt})
    assert json.loads(parts(tokenizer, found)[1]) == [CALL, CALL]


@pytest.mark.parametrize(("calls", "answers"), [("function_call", "function"), ("tool_call", "tool_response")])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_calls_and_answers_of_tools_as_roles_are_those_of_the_fields(tmp_path, tokenizer, calls, answers, names):
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    turns = [("user", "Weather?"), (calls, call), (answers, "rain"), ("assistant", "It rains.")]
    found = examples(tmp_path, {"messages": [dict(zip(names, turn, strict=True)) for turn in turns]})
    assert [parts(tokenizer, one) for one in found] == [
        parts(tokenizer, one) for one in examples(tmp_path, {"messages": CALLED})
    ]


SILENT = TEMPLATE.replace("{% if tools %}{{ tools | tojson }}{% endif %}", "").replace(
    "((m['tool_calls'] | tojson) if m['tool_calls'] else '')", "''"
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ANSWER], "tools": TOOLS}, "line 1: the chat template leaves out the field 'tools'"),
        ({"messages": CALLED[:2]}, r"line 1: turn 2 \(assistant\): the chat template leaves out tool_calls"),
        ({"messages": [USER, ANSWER | {"content": "weather", "tool_calls": [NUMBERS]}]}, "leaves out tool_calls"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}, "turn 2 .assistant.: .* leaves out reas"),
        ({"messages": [USER, ANSWER], "documents": [{"text": "Cats"}]}, "leaves out the field 'documents'"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused_by_name(tmp_path, row, message):
    with pytest.raises(ReftError, match=message):
        encode(tokenizer_with(SILENT), examples(tmp_path, row)[0], "chat", 512)


WORDY = [{"role": "user", "content": "Rain in Oslo? Ask the weather."}, *CALLED[1:]]  # with all that comes back later
NO_TOOLS = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")


@pytest.mark.parametrize(
    ("template", "what"),
    [(SILENT, r"turn 2 \(assistant\): .* tool_calls"), (NO_TOOLS, r"turn 3 \(tool\): .* its content")],
)
def test_what_is_left_out_is_missed_though_another_turn_says_the_same(tmp_path, template, what):
    rows = [{"messages": [*WORDY[:2], {"role": "tool", "content": "Rain in Oslo"}, WORDY[3]]}]
    encode(tokenizer_with(TEMPLATE), *examples(tmp_path, *rows, turns="last"), "chat", 512)
    with pytest.raises(ReftError, match=what):
        encode(tokenizer_with(template), *examples(tmp_path, *rows, turns="last"), "chat", 512)


def test_results_of_several_calls_may_come_in_any_order(tmp_path):
    answers = [{"role": "tool", "content": "b"}, {"role": "tool", "content": "a"}]
    sorting = TEMPLATE.replace("in messages %}", "in messages[:2] + (messages[2:4] | reverse | list) + messages[4:] %}")
    (found,) = examples(tmp_path, {"messages": [*CALLED[:2], *answers, CALLED[3]]}, turns="last")
    assert "<|tool|>a</s><|tool|>b</s>" in parts(tokenizer_with(sorting), found)[0]


def test_a_variable_that_the_template_does_not_have(tmp_path, tokenizer):
    (found,) = examples(tmp_path, {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinkin": False}})
    with pytest.raises(ReftError, match="line 1: the chat template leaves out the field 'enable_thinkin'"):
        encode(tokenizer, found, "chat", 512)


def test_fields_of_turns_that_the_template_makes_nothing_of_are_counted(tmp_path, tokenizer):
    named, weighed = USER | {"name": "Ann", "note": ""}, ANSWER | {"loss_weight": 0}
    found = examples(tmp_path, {"messages": [named, weighed, *MORE[2:]]}, {"messages": [named, ANSWER]})
    tally = Tally(rows=2)
    encode_all(tokenizer, found, "chat", 512, tally=tally)
    assert tally.unread == {"loss_weight of a turn": 1, "name of a turn": 2}
    reading = tokenizer_with(TEMPLATE.replace("m['content'] +", "(m['name'] or '') + m['content'] +"))
    tally = Tally(rows=2)
    encode_all(reading, found, "chat", 512, tally=tally)
    assert tally.unread == {"loss_weight of a turn": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER | {"role": "usr"}, ANSWER]}, "role: expected user, .*, got 'usr'. Did you mean 'user'"),
        ({"messages": [USER, ANSWER | {"value": "D"}]}, "turn 2 .assistant.: 'content' and 'value' say different"),
        ({"messages": [USER, ANSWER | {"reasoning": "a", "thinking": "b"}]}, "'reasoning' and 'thinking' say"),
        ({"messages": [*CALLED[:1], CALLED[1] | {"function_call": CALL}]}, "'tool_calls' or 'function_call', not both"),
        ({"instruction": "Double", "input": 0, "output": "0"}, "the field 'input' should be text, got int"),
        ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, "the field 'history' cannot stand beside a chat"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "the field 'system' cannot"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the field 'images' cannot be learned from"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]}, r"turn 1 \(user\): only parts of text"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "turn 2 .assistant.: weight: expected 0 or 1, got 0.5"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "line 1: no turn is to be learned"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "turn 1 .user.: train: only answers"),
        ({"messages": [ANSWER, USER, ANSWER]}, r"turn 1 \(assistant\): nothing comes before this answer"),
        ({"messages": [USER, ANSWER | {"content": None}]}, "turn 2 .assistant.: the content should be text or a list"),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "turn 1: from: expected human, .* Did you mean 'human'"),
        ({"messages": [USER, "C"]}, "line 1, turn 2: expected fields such as role and content, got str"),
        ({"messages": "A cat?"}, "line 1: expected messages as .*, got str"),
        ({"chosen": "a", "rejected": "b"}, "TRL's DPOTrainer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'completion' is missing; .* TRL's DPOTrainer"),
        ({"messages": str([USER, ANSWER])}, "line 1: expected turns as JSON, got a list as Python prints it"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "line 1: history: expected pairs"),
        ({"prompt": "Say hi \ud83d", "completion": "b"}, "line 1: prompt: half a character, .*ud83d', as of an emoji"),
        ({"messages": [USER, ANSWER | {"content": "\udc00"}]}, "line 1: messages: content: half a character"),
        ({"prompt": "a", "completion": "b", "label": False}, "line 1: the field 'label' is False, .*KTOTrainer.*else"),
        ({"messages": [USER, ANSWER], "weight": 0}, "line 1: the field 'weight' is 0, so this is not to be learned"),
        ({"messages": [USER, ANSWER], "Weight": 0}, "line 1: the field 'Weight' is 0, so this is not to be learned"),
        ({"instruction": "a", "output": "b", "train": "false"}, "the field 'train' is 'false', so this is not"),
        ({"prompt": "a", "completion": "\u200b\ufeff\0 "}, "line 1: the answer is empty"),
        ({"messages": [USER, ANSWER | {"content": "\u200b"}]}, r"turn 2 \(assistant\): the answer is empty"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "w", "input": {"a": 1}}]}]}, "the field .input. of a"),
        ({"prompt": None, "completion": "b"}, "line 1: the field 'prompt' is null; give it a text"),
        ({"prompt": "a", "completion": "b", "kto_tag": False}, "line 1: the field 'kto_tag' is False, .*LLaMA-Factory"),
        ({"messages": [USER, ANSWER | {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}]},
         r"turn 2 \(assistant\): 'train_detail' leaves out a part of an answer"),
        ({"messages": [USER, ANSWER | {"refusal": "No."}]}, "turn 2 .assistant.: 'content' and 'refusal' say"),
        ({"instruction": "a", "input": "b", "response": "c"}, "is missing; .* response. Another name .* `completion_f"),
        ({"text": "a", "completion": "b"}, "got text, completion. Two of other names are given by `prompt_field`"),
        ({"prompt": "a", "completion": None}, "line 1: the field 'completion' is null; give it a text, or leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_by_name(tmp_path, row, message):
    with pytest.raises(ReftError, match=message):
        examples(tmp_path, row)


WRITTEN = "<|user|>A cat?</s><|assistant|>"

# -- templates that do not take every chat ------------------------------------------------------------------------

STRICT = TEMPLATE.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}",
    1,
)  # fmt: skip


def test_the_words_of_a_template_come_with_the_place_and_the_way_out(tmp_path):
    row = {"messages": [{"role": "system", "content": "a"}, USER, ANSWER]}
    with pytest.raises(ReftError) as caught:
        encode(tokenizer_with(STRICT), examples(tmp_path, row)[0], "chat", 512)
    told = str(caught.value)
    assert "a.jsonl, line 1: the chat template refuses the turns: System role not supported" in told
    assert "Put the system text before the first question" in told


THINKING = TEMPLATE.replace("{{ '<|assistant|>' }}{% endif %}", "{{ '<|assistant|><think>\\n' }}{% endif %}")
R1 = THINKING.replace("m['content']", "m['content'].split('</think>')[-1]")
OWN_FIELD = THINKING.replace("m['content']", "('<think>\\n' + (m['reasoning_content'] or '') + '\\n</think>\\n\\n' "
                             "if m['role'] == 'assistant' else '') + m['content']")  # fmt: skip


@pytest.mark.parametrize(
    ("template", "answer", "learned"),
    [
        (THINKING, {"content": "C"}, "C"),  # a template that says nothing of how a thought ends
        (R1, {"content": "C"}, "\n</think>\n\nC"),
        (R1, {"content": "<think>\nHm.\n</think>\n\nC"}, "Hm.\n</think>\n\nC"),
        (R1, {"content": "C", "reasoning_content": "Hm."}, "Hm.\n</think>\n\nC"),
        (OWN_FIELD, {"content": "C"}, "\n</think>\n\nC"),
        (OWN_FIELD, {"content": "<think>\nHm.\n</think>\n\nC"}, "Hm.\n</think>\n\nC"),
        (OWN_FIELD, {"content": "<think>\n\n</think>\n\nC"}, "\n</think>\n\nC"),
    ],
)
def test_a_thought_that_the_prompt_opens(tmp_path, template, answer, learned):
    (found,) = examples(tmp_path, {"messages": [USER, ANSWER | answer]})
    assert parts(tokenizer_with(template), found) == ("<|user|>A cat?</s><|assistant|><think>\n", learned)


@pytest.mark.parametrize(
    "row", [{"prompt": WRITTEN, "completion": "C"}, {"messages": [USER | {"content": WRITTEN}, ANSWER]}]
)
def test_a_prompt_that_is_in_the_template_already_is_not_written_into_it_once_more(tmp_path, tokenizer, row):
    (found,) = examples(tmp_path, row)
    with pytest.raises(ReftError, match=r"line 1: the prompt is in the chat template already, .*</s><\|assistant\|>'"):
        encode(tokenizer, found, "chat", 512)
    if "prompt" in row:
        assert parts(tokenizer, found, "text") == ("<|user|>A cat?</s><|assistant|>", "C")
    with pytest.raises(ReftError, match=r"^the prompt is in the chat template already, .* give the bare prompt\.$"):
        prompt_text(tokenizer, WRITTEN, "chat")
    assert prompt_text(tokenizer, WRITTEN, "text") == WRITTEN
    (found,) = examples(tmp_path, {"prompt": "What is </s><|assistant|>?", "completion": "C"})
    assert parts(tokenizer, found)[1] == "C"


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    rewriting = TEMPLATE + "{% if not add_generation_prompt %}!{% endif %}"
    other = rewriting.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
    with pytest.raises(ReftError, match=r"line 1: the chat template writes the prompt in another way .* `format` text"):
        encode(tokenizer_with(other), examples(tmp_path, {"messages": [USER, ANSWER]})[0], "chat", 512)


# -- rows that are wrong or too long ------------------------------------------------------------------------------


def test_all_wrong_rows_are_told_at_once_or_left_out(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, *({"prompt": "a", "completion": n} for n in range(12))]
    with pytest.raises(ReftError) as caught:
        examples(tmp_path, *rows)
    told = str(caught.value).split("\n")
    assert told[0].startswith("12 of 13 rows are wrong")
    assert "line 2: the field 'completion' should be text, got int" in told[1]
    assert told[10:] == [f"  {tmp_path / 'a.jsonl'}, line 11: the field 'completion' should be text, got int.",
                         "  ... and 2 more"]  # fmt: skip
    tally = Tally("skip")
    assert len(read_examples(tmp_path / "a.jsonl", Reading(on_error="skip"), tally)) == 1
    assert (tally.rows, len(tally.errors)) == (13, 12)


@pytest.mark.parametrize(("how", "counts"), [("cut", (2, 2, 0)), ("skip", (1, 0, 1))])
def test_long_rows_are_cut_from_the_left_or_left_out(tmp_path, how, counts):
    tokenizer = pocket.load()[1]
    found = examples(
        tmp_path, {"prompt": "one two three four five", "completion": "C"}, {"prompt": "a", "completion": "b"}
    )
    if how == "cut":
        found = [found[0], found[0]]
    whole = encode(tokenizer, found[0], "text", 512)
    limit = len(whole["input_ids"]) - 2
    tally = Tally(rows=2)
    _, rows = encode_all(tokenizer, found, "text", limit, long_rows=how, tally=tally)
    assert (len(rows), tally.cut, tally.skipped) == counts
    if how == "cut":  # the first token, then the end of the prompt, then the whole answer
        assert rows[0]["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][3:]
        assert rows[0]["labels"] == [-100] + whole["labels"][3:]


def test_what_long_rows_are_refused_with(tmp_path):
    found = examples(tmp_path, *[{"prompt": "cat " * 30, "completion": "b"}] * 2)
    with pytest.raises(
        ReftError, match=r"2 of 2 rows are wrong.*\n.*line 1: the prompt has \d+ tokens, the context 20"
    ):
        encode_all(pocket.load()[1], found, "text", 20)
    with pytest.raises(ReftError, match="no row is left of 2"):
        encode_all(pocket.load()[1], found, "text", 20, long_rows="skip")


@pytest.mark.parametrize(
    ("rule", "least"), [("all", 0), ("l1", 1), ("f2", 1), ("prompt", 1), ("f1+l1", 2), ("f7+l7", 2)]
)
def test_a_prompt_of_which_no_token_would_be_edited(tmp_path, rule, least):
    tokenizer = pocket.load()[1]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}  # which writes no BOS
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="</s>")
    found = examples(tmp_path, *({"prompt": prompt, "completion": "b"} for prompt in ("What is a cat?", "a", "")))
    assert Positions.parse(rule).least == least
    tally = Tally("skip", rows=3)
    kept, _ = encode_all(bare, found, "text", 512, tally=tally, least=least)
    assert [example.prompt for example in kept] == ["What is a cat?", "a", ""][: 3 - least]
    if least:
        assert "line 3: the prompt has no token, and none would be edited" in tally.listed()


def test_a_row_with_two_wrong_answers_is_one_row(tmp_path):
    found = examples(tmp_path, {"messages": MORE, "tools": TOOLS})
    with pytest.raises(ReftError, match="1 of 1 rows are wrong"):
        encode_all(tokenizer_with(SILENT), found, "chat", 512, tally=Tally(rows=1))


def test_where_every_row_is_left_out_it_is_told_why(tmp_path):
    found = examples(tmp_path, {"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]})
    with pytest.raises(ReftError, match=r"no row is right:\n.*turn 2 .assistant.: .* leaves out reas"):
        encode_all(pocket.load()[1], found, "chat", 512, tally=Tally("skip", rows=1))


def test_the_format_of_chats(tmp_path):
    assert default_format(pocket.load()[1], examples(tmp_path, {"messages": MORE})) == "chat"
