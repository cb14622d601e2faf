"""Chats in a tokenizer's template: the prompt as `generate` writes it, and the answer behind it.

What a row gives comes out in the text, or is refused by its name: no turn, tool or thought is dropped in silence.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import ReftError
from .boundary import Chat
from .fields import Example
from .turns import Turn

_THOUGHT = re.compile(r"\s*<[^<>/]*think[^<>]*>\s*", flags=re.I)  # what a generation prompt may open
_CLOSED = "</think>"
_REOPENED = re.compile(r"\s*</think>\s*<think>")
_CHECKED = ("role", "content", "tool_calls", "reasoning_content")  # fields of a turn without which it is refused
_MOVED = ("system", "developer")  # whose texts some templates write elsewhere
_WAY_OUT = "Mend the row, or write its prompt and its answer out, as `prompt` and `completion`, with `format` text."


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], extras: Mapping[str, Any] | None = None
) -> Chat:
    """Return a chat in the tokenizer's template, up to where the assistant speaks next.

    Raises:
        ReftError: no template, or one that refuses the chat, with its own words.
    """
    return Chat(_render(tokenizer, messages, extras or {}, opened=True))


def chat_texts(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, str]:
    """Return the prompt of a chat as it will be asked, and the answer with what closes it.

    Raises:
        ReftError: a template that refuses the chat, leaves out a part of it, or rewrites the prompt.
    """
    turns = _with_input(example)
    try:
        prompt = chat_text(tokenizer, turns[:-1], example.extras)
        check_bare(turns[-2]["content"], prompt, "give the bare prompt, or `format` text.")
        answer = _answer(tokenizer, turns, example.extras, prompt)
        thought, rest = _thought_of(turns[-1])
        if thought is not None and _REOPENED.match(answer):  # a template that looks for it in its own field alone
            turns[-1] = {**turns[-1], "reasoning_content": thought.strip(), "content": rest.lstrip("\n")}
            answer = _answer(tokenizer, turns, example.extras, prompt)
        _check_complete(tokenizer, turns, example.extras, prompt, answer)
    except ReftError as error:
        also = ("format", "prompt", "completion", *error.also)
        raise ReftError(f"{example.where}: {error.problem}", setting=error.setting, also=also) from None
    return prompt, answer


def check_bare(asked: str, prompt: str, way_out: str = "give the bare prompt.") -> None:
    """Refuse what was in the template before it was written into it as a `prompt`, as its end tells.

    Raises:
        ReftError: with the way out.
    """
    asked = asked.strip()
    ending = prompt[prompt.rfind(asked) + len(asked) :].strip() if asked in prompt else ""
    if ending and asked.endswith(ending):
        raise ReftError(
            f"the prompt is in the chat template already, since it ends with {ending!r}, and would be written into it "
            f"once more; {way_out}"
        )


def unread_fields(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], text: str) -> set[str]:
    """The fields of turns that the template makes nothing of in a text, such as `name`, as most do."""
    return {
        name
        for turn in turns
        for name, held in turn.items()
        if name not in _CHECKED and held not in ("", [], {})
        if (_end_of(text, held) is None if isinstance(held, str) else name not in _template(tokenizer))
    }


def _with_input(example: Example) -> list[Turn]:
    """The turns, with an instruction's further input behind it."""
    turns = list(example.messages)
    if example.given:
        turns[-2] = {**turns[-2], "content": f"{turns[-2]['content']}\n\n{example.given}"}
    return turns


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], extras: Mapping[str, Any], opened: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ReftError("The tokenizer has no chat template; give prompts as they stand, with the format 'text'.")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened, **extras)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        if "System" in str(error) or "system" in str(error):
            hint = " Put the system text before the first question of the user."
        else:
            hint = ""
        raise ReftError(f"the chat template refuses the turns: {error}.{hint} {_WAY_OUT}") from None
    return text


def _answer(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], extras: Mapping[str, Any], prompt: str) -> str:
    """What stands behind the prompt where the last turn answers it."""
    whole = _render(tokenizer, turns, extras).rstrip()
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return _behind_opening(tokenizer, turns[-1], prompt, whole, _render(tokenizer, turns[:-1], extras))


def _behind_opening(tokenizer: PreTrainedTokenizerBase, turn: Turn, prompt: str, whole: str, bare: str) -> str:
    """The answer behind a prompt that opens a thought, which the template leaves out once it is answered."""
    opening, rest = prompt.removeprefix(bare), whole.removeprefix(bare)
    pairs = enumerate(zip(opening, rest, strict=False))
    same = next((at for at, (left, right) in pairs if left != right), min(len(opening), len(rest)))
    thought = opening[same:]
    if not (prompt.startswith(bare) and whole.startswith(bare) and _THOUGHT.match(thought)):
        raise ReftError(f"the chat template writes the prompt in another way once it is answered. {_WAY_OUT}")
    answer = rest[same:]
    if _CLOSED in thought:  # an empty thought, closed at once
        return answer
    reasoning, visible = _thought_of(turn)
    if reasoning is not None:
        shown = visible.strip()
        closing = answer[answer.rfind(shown) + len(shown) :] if shown else ""
        return f"{reasoning.strip()}\n{_CLOSED}\n\n{shown}{closing}"
    # a template that knows how a thought ends has answers outside of it
    return f"\n{_CLOSED}\n\n{answer}" if _CLOSED in _template(tokenizer) else answer


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return "".join(template.values()) if isinstance(template, dict) else str(template)


def _thought_of(turn: Turn) -> tuple[str | None, str]:
    """The thought of an answer, none without one, and the rest of it."""
    if turn.get("reasoning_content"):
        return turn["reasoning_content"], turn["content"]
    thought, closed, rest = turn["content"].partition(_CLOSED)
    return (re.sub(_THOUGHT, "", thought, count=1), rest) if closed else (None, turn["content"])


def _check_complete(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], extras: Mapping[str, Any], prompt: str, answer: str
) -> None:
    """Refuse what the template leaves out of the text; only thoughts of earlier answers may be."""
    for name in extras:
        if name not in _template(tokenizer):
            raise ReftError(f"the chat template leaves out the field {name!r}. {_WAY_OUT}")
    begin = end = 0  # of where a turn may stand: behind the one before, but for those that templates move
    for number, turn in enumerate(turns, 1):
        last = number == len(turns)
        text = answer if last else prompt
        place = f"turn {number} ({turn['role']})"
        if last or turn["role"] in _MOVED:
            start = 0
        else:
            begin = start = begin if turn["role"] == "tool" == turns[number - 2]["role"] else end
        thought, rest = _thought_of(turn) if turn["role"] == "assistant" else (None, turn["content"])
        if (found := _end_of(text, rest, start)) is None:
            raise ReftError(f"{place}: the chat template leaves its content out of the text. {_WAY_OUT}")
        if last and thought and _end_of(text, thought) is None:
            field = "reasoning_content" if turn.get("reasoning_content") else "the thought in its content"
            raise ReftError(f"{place}: the chat template leaves out {field}. {_WAY_OUT}")
        for part in _parts_of_calls(turn):
            if (of_call := _end_of(text, part, start)) is None:
                raise ReftError(f"{place}: the chat template leaves out tool_calls. {_WAY_OUT}")
            found = max(found, of_call)
        end = end if turn["role"] in _MOVED else max(end, found)
    for name in ("tools", "documents"):
        for given in extras.get(name, ()):
            if any(_end_of(prompt, text) is None for text in _names(given)):
                raise ReftError(f"the chat template leaves out the field {name!r}. {_WAY_OUT}")


def _parts_of_calls(turn: Turn) -> Iterator[str]:
    """The names and the texts of a turn's calls of tools, and the names of their arguments."""
    for call in turn.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        values = [*arguments, *arguments.values()] if isinstance(arguments, dict) else [arguments]
        yield from (call["function"]["name"], *(value for value in values if isinstance(value, str)))


def _names(given: Any) -> list[str]:
    """By which texts a tool or a document is known."""
    fields = given.get("function", given) if isinstance(given, dict) else {}
    return [fields[name] for name in ("name", "text") if isinstance(fields, dict) and isinstance(fields.get(name), str)]


def _end_of(text: str, part: str, start: int = 0) -> int | None:
    """Where a part of a text ends that begins at `start` or behind, perhaps as JSON writes it; None without it."""
    part = part.strip()
    forms = {part, *(json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True))}
    return min((at + len(form) for form in forms if (at := text.find(form, start)) >= 0), default=None)
