"""The turns of a chat as people write them: OpenAI's, ShareGPT's and TRL's, in one shape.

A turn is a dict with `role` and `content`, a text, and what else the chat template is to have, such as `tool_calls`.
Knows nothing of templates or tokenizers.
"""

import json
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import ReftError, check_type, did_you_mean
from ..files.text import parse_json

Turn = dict[str, Any]
_CALLS = ("function_call", "tool_call")  # who speaks in a turn that is a call of a tool, as JSON
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", *_CALLS), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "tool"),
    "system": "system",
}
# what `role` may say, in capitals or not; other roles are for templates that have them
_ROLES = {name: name for name in ("user", "assistant", "system", "developer", "tool")} | {
    name: role for name, role in _SHAREGPT.items() if name != "observation"
}
LEARN = ("weight", "train", "training", "loss")  # by which names a turn, or a row, says whether it is learned
_ARGUMENTS = ("arguments", "parameters")  # of a call, the latter as Llama writes it
_OF_CALLS = {"id", "type", "index", "function", "name", *_ARGUMENTS}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("text", "input_text", "output_text")  # the kinds of a content's parts that are read
_IN_PART = ("train_detail", "training_detail")  # axolotl's: which letters of an answer are not learned
_PICTURES = ("images", "image", "videos", "video", "audio", "audios", "image_url")


def read_turns(value: Any, where: str) -> tuple[list[Turn], list[bool]]:
    """Return the turns of a chat, and which of them are to be learned: the assistant's, unless they say otherwise.

    Args:
        value: a list of `{"role", "content"}` or `{"from", "value"}`, or a JSON text of one.
        where: the row, for messages.

    Raises:
        ReftError: naming the turn, and what is wrong in it.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        if value.lstrip("[ \n").startswith("{'"):
            raise ReftError(
                f"{where}: expected turns as JSON, got a list as Python prints it; write it with json.dumps, or save "
                "the table as JSON Lines or parquet."
            )
        value = parse_json(value, where)
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else type(value).__name__
        raise ReftError(f'{where}: expected messages as [{{"role": "user", "content": "..."}}, ...], got {came}.')
    turns, learned = [], []
    for number, turn in enumerate(value, 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise ReftError(f"{place}: expected fields such as role and content, got {type(turn).__name__}.")
        read, learn = _turn({name: held for name, held in turn.items() if held is not None}, place)
        turns.append(read)
        learned.append(learn)
    return turns, learned


def check_answers(turns: Sequence[Turn], learned: Sequence[bool], where: str) -> list[bool]:
    """Which turns are learned, checked: the last one is an answer, each has something before it and is not empty.

    Raises:
        ReftError: naming the turn.
    """
    if turns[-1]["role"] != "assistant":
        raise ReftError(
            f"{where}, turn {len(turns)} ({turns[-1]['role']}): expected messages as "
            '[{"role": "user", "content": "..."}, ...] that end with an answer of the role \'assistant\'.'
        )
    for number, (turn, learn) in enumerate(zip(turns, learned, strict=True), 1):
        if not learn:
            continue
        place = f"{where}, turn {number} (assistant)"
        if is_blank(turn["content"]) and not turn.get("tool_calls"):
            raise ReftError(f"{place}: the answer is empty, there is nothing to learn.")
        if number == 1:
            raise ReftError(f'{place}: nothing comes before this answer; leave it out, or give it "train": false.')
    if not any(learned):
        raise ReftError(f"{where}: no turn is to be learned; all answers have a weight of 0 or train false.")
    return list(learned)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it has white space, control characters and those of no width alone."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def _turn(turn: Turn, where: str) -> tuple[Turn, bool]:
    role = _role(turn, where)
    where = f"{where} ({role})"
    for name in _PICTURES:
        if turn.get(name):
            raise ReftError(f"{where}: {name!r} cannot be learned from; only text is read.")
    for name in _IN_PART:
        if turn.get(name):
            raise ReftError(
                f"{where}: {name!r} leaves out a part of an answer, which is learned as a whole; write that part into "
                "a turn of its own, or leave the field out."
            )
    read = {name: held for name, held in turn.items() if name not in ("from", "value", "refusal", *LEARN)}
    read["role"] = role
    refused = ("refusal",) if turn.get("refusal") else ()  # where OpenAI has what the assistant said in place of it
    content = _either(turn, ("content", "value", *refused), where)
    if str(turn.get("role", turn.get("from"))).strip().lower() in _CALLS:
        called = _parsed(content, where)
        read["tool_calls"], content = called if isinstance(called, list) else [called], ""
    if "function_call" in turn:
        if read.get("tool_calls"):
            raise ReftError(f"{where}: give the calls as 'tool_calls' or 'function_call', not both.")
        read["tool_calls"] = [read.pop("function_call")]
    if read.get("tool_calls"):
        read["tool_calls"] = [_call(call, where) for call in _calls(read["tool_calls"], where)]
    else:
        read.pop("tool_calls", None)
    thought = _either(turn, _THOUGHTS, where)
    read = {name: held for name, held in read.items() if name not in _THOUGHTS}
    if thought is not None:
        check_type(f"{where}: reasoning_content", thought, str)
        read["reasoning_content"] = thought
    read["content"] = _content(content, where, bool(read.get("tool_calls")))
    return read, _learn(turn, role, where)


def _either(turn: Turn, names: Sequence[str], where: str) -> Any:
    """What a turn has under the first of these names; under another, it may only have the same."""
    found = [name for name in names if name in turn]
    for name in found[1:]:
        if turn[name] != turn[found[0]]:
            raise ReftError(f"{where}: {found[0]!r} and {name!r} say different things; give one of them.")
    return turn[found[0]] if found else None


def _role(turn: Turn, where: str) -> str:
    if "role" in turn:
        check_type(f"{where}: role", turn["role"], str)
        name = turn["role"].strip().lower()
        near = get_close_matches(name, ("user", "assistant", "system"), n=1, cutoff=0.8)
        if name not in _ROLES and (near or not name):
            known = ", ".join(_ROLES)
            raise ReftError(f"{where}: role: expected {known}, got {turn['role']!r}.{did_you_mean(name, near)}")
        return _ROLES[name] if name in _ROLES else turn["role"]
    if "from" not in turn:
        raise ReftError(f"{where}: the field 'role' is missing.{did_you_mean('role', turn)}")
    name = str(turn["from"]).strip().lower()
    if name not in _SHAREGPT:
        expected = ", ".join(_SHAREGPT)
        raise ReftError(f"{where}: from: expected {expected}, got {turn['from']!r}.{did_you_mean(name, _SHAREGPT)}")
    return _SHAREGPT[name]


def _content(content: Any, where: str, called: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and called:
        return ""
    if not isinstance(content, list):
        came = "none" if content is None else type(content).__name__
        raise ReftError(f"{where}: the content should be text or a list of parts, got {came}.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (kind not in _TEXTS and not isinstance(part, str)):
            raise ReftError(
                f"{where}: only parts of text are read, got one of the type {kind or type(part).__name__!r}."
            )
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, where: str) -> list[Any]:
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ReftError(f"{where}: tool_calls: expected a list, got {type(value).__name__}.")
    return value


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool as templates take it: the arguments as fields, where OpenAI has them as a JSON text."""
    call = _parsed(call, where) if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ReftError(f"{where}: tool_calls: expected the name and the arguments of a function, got {call!r}.")
    said = {name: value for held in (call, function) for name, value in held.items() if value not in (None, "", {})}
    if more := said.keys() - _OF_CALLS:
        raise ReftError(f"{where}: tool_calls: the field {min(more)!r} of a call is not read; leave it out.")
    arguments = _either(said, _ARGUMENTS, f"{where}: tool_calls") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if _is_json(arguments) else arguments
    rest = {name: held for name, held in call.items() if name == "id"}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(value: Any, where: str) -> Any:
    return parse_json(value, f"{where}: tool_calls") if isinstance(value, str) else value


def _learn(turn: Turn, role: str, where: str) -> bool:
    learn = role == "assistant"
    for name in LEARN:
        if name not in turn:
            continue
        value = turn[name]
        if value not in (0, 1):
            expected = "0 or 1" if name == "weight" else "true or false"
            raise ReftError(f"{where}: {name}: expected {expected}, got {value!r}.")
        if value and role != "assistant" and name != "weight":
            raise ReftError(f"{where}: {name}: only answers of the role 'assistant' are learned.")
        learn = learn and bool(value)
    return learn
