"""Tools in a chat: whether a model's template takes them, and the calls in what it answers.

The form is the one that most templates have: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
"""

import json
import re
import uuid
from typing import Any

from ...errors import ReftError
from .bodies import Message

_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.S)
_PROBE: Any = {"type": "function", "function": {"name": "pyreft_probe", "description": "", "parameters": {}}}


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: its text in one piece, the arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise ReftError(f"expected a text in the {message.role}'s message, got none.", setting="messages")
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": _read(call)}}
            for call in message.tool_calls
        ]
    return made


def _read(call: Any) -> Any:
    try:
        return json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        return call.function.arguments


def check_takes_tools(tokenizer: Any) -> None:
    """Refuse tools for a model whose chat template does not show them to it, or shows another form of calls.

    Raises:
        ReftError: it is one.
    """
    template = tokenizer.chat_template or ""
    turns = [{"role": "user", "content": "?"}]
    shown = template and tokenizer.apply_chat_template(turns, tools=[_PROBE], tokenize=False)
    if "pyreft_probe" not in shown:
        raise ReftError("the model cannot call tools: its chat template does not take them.", setting="tools")
    if "<tool_call>" not in template or "<function=" in template:
        raise ReftError(
            "the model's template has calls in a form that this engine does not read; serve it with --engine vllm "
            "and a --tool-call-parser.",
            setting="tools",
        )


def check_shows_calls(turns: list[dict[str, Any]], text: str) -> None:
    """Refuse a chat of whose calls of tools the chat template makes nothing.

    Raises:
        ReftError: naming the function.
    """
    for name in (call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())):
        if name not in text and json.dumps(name)[1:-1] not in text:
            raise ReftError(f"the model's chat template leaves out tool_calls, of {name!r}.", setting="messages")


def take_calls(text: str, parallel: bool | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return an answer without its calls, and these; what is no whole call stays in the text.

    Args:
        parallel: false for the first call alone, as `parallel_tool_calls` asks for.
    """
    calls: list[dict[str, Any]] = []

    def take(found: re.Match) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return found[0]
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return found[0]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": written},
            }
        )
        return ""

    text = _CALL.sub(take, text)
    return text, calls[:1] if parallel is False else calls
