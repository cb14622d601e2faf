"""From the fields of a row to the examples in it: which forms of rows there are, and what each field means.

Knows nothing of files, tokenizers or templates.
"""

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ReftError, did_you_mean
from ..files.text import parse_json
from .turns import LEARN, Turn, check_answers, is_blank, read_turns

Format = Literal["text", "chat", "alpaca"]
Turns = Literal["each", "last"]
Names = tuple[str | None, str | None]
FORMATS: tuple[Format, ...] = ("text", "chat", "alpaca")
_FORMS = {
    "prompt and completion": ("prompt", "completion"),
    "instruction, input and output": ("instruction", "output"),
    "messages or conversations": ("messages",),
}
_CHATS = ("messages", "conversations", "conversation")
EXTRAS = ("system", "history", "tools", "functions", "documents", "chat_template_kwargs")  # given to the template
_ALSO = {"system_prompt": "system", "system_message": "system"}  # other names of these
_DECIDED = {  # what a row may not say to the tokenizer
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "messages"),
}
LABELS = {"label": "TRL's KTOTrainer", "kto_tag": "KTO in LLaMA-Factory"}  # which say that an answer is a bad one
_OTHERS = ("images", "image", "videos", "video", "audio", "audios")
_NONE = ("[]", "{}", "null")  # nothing, as a table of texts has it
KNOWN = (*("prompt", "completion", "instruction", "input", "output"), *_CHATS, *EXTRAS)


@dataclass(frozen=True)
class Example:
    """One answer to learn, and what comes before it.

    Args:
        where: the file and line, for messages.
        format: how the prompt is meant: literal text, a chat, or an instruction for Alpaca's template.
        messages: the turns of a chat, the answer last; else one user turn and the answer.
        given: the further input of an instruction.
        extras: what the chat template gets beside the turns, such as `tools`.
        row: where the chat stands that it is an answer of, if the chat has several.
    """

    where: str
    format: Format
    messages: tuple[Turn, ...]
    given: str = ""
    extras: dict[str, Any] = field(default_factory=dict)
    row: str = ""

    @property
    def prompt(self) -> str:
        """The last turn before the answer; in the template of the Alpaca data set where it is meant for it."""
        asked = self.messages[-2]["content"]
        return alpaca_prompt(asked, self.given) if self.format == "alpaca" else asked

    @property
    def completion(self) -> str:
        """The answer."""
        return self.messages[-1]["content"]


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """An instruction, and what it is about if anything, in the template of the Alpaca data set."""
    about = "that describes a task"
    if given:
        about += ", paired with an input that provides further context"
    asked = f"### Instruction:\n{instruction}\n\n"
    if given:
        asked += f"### Input:\n{given}\n\n"
    return (
        f"Below is an instruction {about}. Write a response that appropriately completes the request.\n\n"
        f"{asked}### Response:\n"
    )


def plain_names(row: dict[str, Any], kept: Collection[str | None] = ()) -> dict[str, Any]:
    """A row whose known fields have their names in small letters, whatever a spreadsheet or another program made."""
    named: dict[str, Any] = {}
    for name, value in row.items():
        small = _shown(str(name)).strip().lower()
        small = _ALSO.get(small, small)
        free = row.get(small) is None and named.get(small) is None
        key = small if small in KNOWN and free and name not in kept else str(name)
        if value is not None or key not in named:
            named[key] = value
    return named


def _shown(name: str) -> str:
    """A name without marks and letters of no width, which nobody sees."""
    if name.isascii():
        return name
    return "".join(letter for letter in name if unicodedata.category(letter) != "Cf")


def read_fields(
    row: dict[str, Any],
    where: str,
    *,
    turns: Turns = "each",
    fields: Names = (None, None),
    missing: Collection[str] = (),
) -> tuple[str, list[Example], list[str]]:
    """Return the form of a row, its examples, and the names of fields that mean nothing here.

    Args:
        row: with fields of one of the forms.
        where: the row, for messages.
        turns: learn each answer of a chat, or the last alone.
        fields: the names of the prompt and the completion, None for one that is found by itself.
        missing: texts by which the file says that there is none.

    Raises:
        ReftError: a field that is missing, of another type, or that could not be learned from.
    """
    named = plain_names(row, fields)
    row = {name: value for name, value in named.items() if value is not None}
    form, used = _form(row, where, fields, named.keys() - row.keys())
    _check_learned(row, where, used)
    if (empty := next((name for name in (*used, *EXTRAS) if row.get(name) in missing), None)) is not None:
        raise ReftError(
            f"{where}: the field {empty!r} is {row[empty]!r}, as pandas writes one that is missing; leave it empty, or "
            "the row out. If it is meant as a text, save the table as JSON Lines."
        )
    for name in _OTHERS:
        if row.get(name):
            raise ReftError(f"{where}: the field {name!r} cannot be learned from; only text is read.")
    extras = extras_of(row)
    if form == "messages":
        messages, learned = read_turns(row[used[0]], where)
        examples = _chat(messages, learned, extras, where, turns)
    elif form == "prompt" and not (isinstance(row[used[0]], str) and isinstance(row[used[1]], str)):
        messages, learned = _prompt_turns(row, used, where)
        examples = _chat(messages, learned, extras, where, turns)
    else:
        examples = [_pair(row, form, used, extras, where)]
    return form, examples, [name for name in row if name not in used and name not in EXTRAS]


def extras_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives to the chat template beside its turns; nothing for empty ones, as a table of texts has them."""
    return {name: row[name] for name in EXTRAS if row.get(name) and (name == "system" or row[name] not in _NONE)}


def _check_learned(row: dict[str, Any], where: str, used: tuple[str, ...]) -> None:
    """Refuse a row that says it is not to be learned."""
    for name in row:
        if (
            name not in used
            and name.strip().lower() in LEARN
            and str(row[name]).strip().lower() in ("false", "0", "0.0")
        ):
            raise ReftError(
                f"{where}: the field {name!r} is {row[name]!r}, so this is not to be learned; leave the row out."
            )


def bad_answers(name: str, labels: dict[str, Any]) -> dict[str, ReftError]:
    """What to say of rows whose answers are bad ones, in data for KTO: all labels are true or false.

    Args:
        name: the field, one of `LABELS`.
        labels: what it says in the rows that have it, by their places.
    """
    said = {where: str(label).strip().lower() for where, label in labels.items()}
    if not {*said.values()} <= {"true", "false"}:
        return {}
    return {
        where: ReftError(
            f"{where}: the field {name!r} is {labels[where]!r}, with which data for {LABELS[name]} mark a bad answer; "
            "leave the row out, or call the column something else if it means something else."
        )
        for where, label in said.items()
        if label == "false"
    }


def _form(row: dict[str, Any], where: str, fields: Names, nulls: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Which form a row has, and the fields that it is made of; `nulls` are those without a value."""
    pairs = " They are pairs of a better and a worse answer, for TRL's DPOTrainer." if "chosen" in row else ""
    prompt, answer = fields
    names = (name for held in (row, nulls) for name in ("prompt", "instruction") if name in held)
    found = next((name for name in names if name != answer), None)
    if not any(fields) and (chat := next((name for name in _CHATS if name in row), None)):
        return "messages", (chat,)
    if not any(fields) and found is None:
        raise ReftError(
            f"{where}: expected the fields {'; or '.join(_FORMS)}, got {_names(row)}.{pairs} Two of other names are "
            "given by `prompt_field` and `completion_field`.",
            also=["prompt_field", "completion_field"],
        )
    form = "instruction" if (prompt or found) == "instruction" else "prompt"
    used = prompt or found or "prompt", answer or ("output" if form == "instruction" else "completion")
    for name, option, given in zip(used, ("prompt_field", "completion_field"), fields, strict=True):
        if name not in row or (used[0] == used[1] and given is None):
            if name in nulls:
                raise ReftError(f"{where}: the field {name!r} is null; give it a text, or leave the row out.")
            hint = pairs or did_you_mean(name, row.keys() - {*used, *KNOWN})
            raise ReftError(
                f"{where}: the field {name!r} is missing; the row has {_names(row)}.{hint} Another name is given by "
                f"`{option}`.",
                also=[option],
            )
    return form, (*used, "input") if form == "instruction" else used


def _names(row: dict[str, Any]) -> str:
    """The fields of a row that say something, for messages."""
    return ", ".join(map(str, row)) or "none"


def _pair(row: dict[str, Any], form: str, used: tuple[str, ...], extras: dict[str, Any], where: str) -> Example:
    asked, answered = used[:2]
    prompt, answer = _string(row, asked, where), _string(row, answered, where)
    more = form == "instruction" and answered != "input" and row.get("input", []) != []
    given = _string(row, "input", where) if more else ""
    if is_blank(answer):
        raise ReftError(f"{where}: the answer is empty, there is nothing to learn.")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if not extras:
        return Example(where, "alpaca" if form == "instruction" else "text", tuple(turns), given)
    before, options = _extras(extras, where)
    return Example(where, "chat", (*before, *turns), given, options)


def _chat(messages: list[Turn], learned: list[bool], extras: dict[str, Any], where: str, turns: Turns) -> list[Example]:
    """An example for each answer, whose prompt is what comes before it."""
    if "history" in extras:
        raise ReftError(f"{where}: the field 'history' cannot stand beside a chat; put its turns into the chat.")
    if messages[0]["role"] == "system" and extras.get("system") == messages[0]["content"]:
        extras = {name: held for name, held in extras.items() if name != "system"}  # said twice
    if "system" in extras and messages[0]["role"] == "system":
        raise ReftError(f"{where}: the field 'system' cannot stand beside a turn of the role 'system'; give one.")
    learned = check_answers(messages, learned, where)
    before, options = _extras(extras, where)
    numbers = [number for number, learn in enumerate(learned) if learn]
    if turns == "last":
        numbers = numbers[-1:]
    several = len(numbers) > 1
    return [
        Example(
            f"{where}, turn {number + 1}" if several else where,
            "chat",
            (*before, *messages[: number + 1]),
            extras=options,
            row=where,
        )
        for number in numbers
    ]


def _prompt_turns(row: dict[str, Any], used: tuple[str, ...], where: str) -> tuple[list[Turn], list[bool]]:
    """TRL's prompt and completion, of which one or both are lists of turns; those of the completion are learned."""
    sides = []
    for name, role in zip(used, ("user", "assistant"), strict=False):
        if isinstance(row[name], str):
            sides.append(([{"role": role, "content": row[name]}], [role == "assistant"]))
        elif isinstance(row[name], list):
            sides.append(read_turns(row[name], f"{where}: {name}"))
        else:
            _string(row, name, where)
    (asked, _), (answered, learned) = sides
    (told, questions), (again, rest) = (_told(turns) for turns in (asked, answered))
    if rest[: len(questions)] == questions and (not told or not again or told == again):
        asked, rest = (told or again) + questions, rest[len(questions) :]  # a completion that holds its prompt, too
        return asked + rest, [False] * len(asked) + learned[len(answered) - len(rest) :]
    return asked + answered, [False] * len(asked) + learned


def _told(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The system's turn, where a chat begins with one, and the others."""
    begin = int(turns[0]["role"] == "system")
    return turns[:begin], turns[begin:]


def _extras(extras: dict[str, Any], where: str) -> tuple[list[Turn], dict[str, Any]]:
    """The turns that come before a row's own, and what the template gets beside them."""
    before: list[Turn] = []
    if "system" in extras:
        before.append({"role": "system", "content": _string(extras, "system", where)})
    for number, pair in enumerate(_listed(extras, "history", where), 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ReftError(f"{where}: history: expected pairs of a question and its answer, got {pair!r} ({number}).")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    options: dict[str, Any] = {}
    tools = _listed(extras, "tools", where)
    tools += [{"type": "function", "function": function} for function in _listed(extras, "functions", where)]
    if tools:
        options["tools"] = tools
    if documents := _listed(extras, "documents", where):
        options["documents"] = documents
    if "chat_template_kwargs" in extras:
        more = extras["chat_template_kwargs"]
        if not isinstance(more, dict) or _DECIDED & more.keys():
            raise ReftError(f"{where}: chat_template_kwargs: expected names of the template's own and their values.")
        options |= more
    return before, options


def _listed(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name, [])
    if isinstance(value, str):
        value = parse_json(value, f"{where}: {name}")
    if not isinstance(value, list):
        raise ReftError(f"{where}: the field {name!r} should be a list, got {type(value).__name__}.")
    return value


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ReftError(f"{where}: the field {name!r} should be text, got {type(row[name]).__name__}.")
    return row[name]
