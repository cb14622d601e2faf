"""Chats in a tokenizer's template: the prompt as `generate` writes it, and the answer behind it.

What a row gives comes out in the text, or is refused by its name: no turn, tool or thought is dropped in silence.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import ReftError
from .fields import Example
from .turns import Turn

_THOUGHT = re.compile(r"\s*<[^<>/]*think[^<>]*>\s*", flags=re.I)  # what a generation prompt may open
_CLOSED = "</think>"
_WAY_OUT = "Mend the row, or write its prompt and its answer out, as `prompt` and `completion`, with `format` text."


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], extras: Mapping[str, Any] | None = None
) -> str:
    """Return a chat in the tokenizer's template, up to where the assistant speaks next.

    Raises:
        ReftError: no template, or one that refuses the chat, with its own words.
    """
    return _render(tokenizer, messages, extras or {}, opened=True)


def chat_texts(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, str]:
    """Return the prompt of a chat as it will be asked, and the answer with what closes it.

    Raises:
        ReftError: a template that refuses the chat, leaves out a part of it, or rewrites the prompt.
    """
    turns = _with_input(example)
    try:
        prompt = chat_text(tokenizer, turns[:-1], example.extras)
        whole = _render(tokenizer, turns, example.extras).rstrip()
        if whole.startswith(prompt):
            answer = whole[len(prompt) :]
        else:
            bare = _render(tokenizer, turns[:-1], example.extras)
            answer = _behind_opening(tokenizer, turns[-1], prompt, whole, bare)
        _check_complete(turns, example.extras, prompt, answer)
    except ReftError as error:
        also = ("format", "prompt", "completion", *error.also)
        raise ReftError(f"{example.where}: {error.problem}", setting=error.setting, also=also) from None
    return prompt, answer


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


def _check_complete(turns: Sequence[Turn], extras: Mapping[str, Any], prompt: str, answer: str) -> None:
    """Refuse what the template leaves out of the text; only thoughts of earlier answers may be."""
    for number, turn in enumerate(turns, 1):
        last = number == len(turns)
        text = answer if last else prompt
        place = f"turn {number} ({turn['role']})"
        thought, rest = _thought_of(turn) if turn["role"] == "assistant" else (None, turn["content"])
        if not _shows(text, rest):
            raise ReftError(f"{place}: the chat template leaves its content out of the text. {_WAY_OUT}")
        if last and thought and not _shows(text, thought):
            field = "reasoning_content" if turn.get("reasoning_content") else "the thought in its content"
            raise ReftError(f"{place}: the chat template leaves out {field}. {_WAY_OUT}")
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            values = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
            if not all(_shows(text, str(part)) for part in (call["function"]["name"], *_texts(values))):
                raise ReftError(f"{place}: the chat template leaves out tool_calls. {_WAY_OUT}")
    for name in ("tools", "documents"):
        for given in extras.get(name, ()):
            if not all(_shows(prompt, text) for text in _names(given)):
                raise ReftError(f"the chat template leaves out the field {name!r}. {_WAY_OUT}")


def _names(given: Any) -> list[str]:
    """By which texts a tool or a document is known."""
    fields = given.get("function", given) if isinstance(given, dict) else {}
    return [fields[name] for name in ("name", "text") if isinstance(fields, dict) and isinstance(fields.get(name), str)]


def _texts(values: Sequence[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _shows(text: str, part: str) -> bool:
    """Whether a text is a part of another, perhaps as JSON writes it."""
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
