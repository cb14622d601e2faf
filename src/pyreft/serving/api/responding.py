"""`/v1/responses`, as far as agents need it: nothing is stored, so each request brings all of its turns."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ...errors import ReftError
from ..laptop.requests import Piece
from .bodies import CalledFunction, Item, Message, ResponseBody, ToolCall
from .completing import event
from .faults import Fault
from .service import Asked
from .tools import take_calls


def messages_of(body: ResponseBody) -> list[Message]:
    """The turns of a request as those of a chat.

    Raises:
        ReftError: an item without what it needs.
    """
    found = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*found, Message(role="user", content=body.input)]
    for item in body.input:
        if item.type == "message" and item.role is not None:
            found.append(Message(role=item.role, content=item.content))
        elif item.type == "function_call" and item.name is not None:
            call = ToolCall(
                id=_call_id(item), function=CalledFunction(name=item.name, arguments=item.arguments or "{}")
            )
            if found and found[-1].tool_calls:  # calls that were made together
                found[-1].tool_calls.append(call)
            else:
                found.append(Message(role="assistant", tool_calls=[call]))
        elif item.type == "function_call_output" and item.output is not None:
            found.append(Message(role="tool", content=item.output, tool_call_id=_call_id(item)))
        else:
            raise ReftError(f"an item of the type {item.type!r} lacks its role, name or output.", setting="input")
    return found


def _call_id(item: Item) -> str:
    if item.call_id is None:
        raise ReftError(f"expected a call_id in a {item.type}.", setting="input")
    return item.call_id


def tools_of(body: ResponseBody) -> list[dict[str, Any]]:
    """The tools of a request, as chat templates read them; none where none may be called."""
    if body.tool_choice == "none":
        return []
    return [
        {"type": "function", "function": tool.model_dump(include={"name", "description", "parameters"})}
        for tool in body.tools or ()
    ]


class ResponseWriting:
    """The response in the making."""

    def __init__(self, asked: Asked, body: ResponseBody) -> None:
        self.asked, self.body, self.number = asked, body, -1
        self.tools = bool(tools_of(body))
        self.prompt_tokens = asked.prompt_tokens
        request = asked.requests[0]
        self.head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "store": False,
            "error": None,
        }

    async def answer(self) -> dict[str, Any]:
        """The whole response."""
        text, end = "", "stop"
        async for _, piece in self.asked.pieces():
            text += piece.text
            end = piece.finish or end
        return self._whole(self._items(text, end), end)

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """The response as a stream of events."""
        begun = {**self.head, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        text, end = "", "stop"
        message = _message("", "in_progress") if not self.tools else None
        if message is not None:
            for one in self._opening(message, 0):
                yield one
        try:
            async for _, piece in pieces:
                text += piece.text
                end = piece.finish or end
                if message is not None and piece.text:
                    yield self._delta(message, 0, piece.text)
        except Fault as fault:
            yield self._event("error", **fault.body()["error"])
            failed = {**begun, "status": "failed", "error": {"code": "server_error", "message": fault.message}}
            yield self._event("response.failed", response=failed)
            return
        if self.asked.outcome != "done":  # the client has gone
            return
        if message is not None:
            items = [_message(text, "completed" if end == "stop" else "incomplete", message["id"])]
        else:
            items = self._items(text, end)
        for index, item in enumerate(items):
            if message is None:
                for one in self._opening(item, index):
                    yield one
                if item["type"] == "message":
                    yield self._delta(item, index, item["content"][0]["text"])
            for one in self._closing(item, index):
                yield one
        whole = self._whole(items, end)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _items(self, text: str, end: str) -> list[dict[str, Any]]:
        """What the response holds: a message, or the calls in it."""
        text, calls = take_calls(text, self.body.parallel_tool_calls) if self.tools else (text, [])
        found = [_message(text, "completed" if end == "stop" else "incomplete")] if text or not calls else []
        for call in calls:
            found.append(
                {
                    "id": f"fc_{uuid.uuid4().hex}",
                    "type": "function_call",
                    "status": "completed",
                    "call_id": call["id"],
                    **call["function"],
                }
            )
        return found

    def _whole(self, items: list[dict[str, Any]], end: str) -> dict[str, Any]:
        read, made = self.prompt_tokens, self.asked.tokens
        return {
            **self.head,
            "status": "completed" if end == "stop" else "incomplete",
            "incomplete_details": None if end == "stop" else {"reason": "max_output_tokens"},
            "output": items,
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + made,
            },
        }

    def _opening(self, item: dict[str, Any], index: int) -> list[bytes]:
        left_out: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        empty = {**item, "status": "in_progress", **left_out}
        found = [self._event("response.output_item.added", output_index=index, item=empty)]
        if item["type"] == "message":
            where = {"item_id": item["id"], "output_index": index, "content_index": 0}
            found.append(self._event("response.content_part.added", **where, part=_part("")))
        return found

    def _delta(self, item: dict[str, Any], index: int, text: str) -> bytes:
        where = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return self._event("response.output_text.delta", **where, delta=text, logprobs=[])

    def _closing(self, item: dict[str, Any], index: int) -> list[bytes]:
        where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part = item["content"][0]
            where["content_index"] = 0
            found = [
                self._event("response.output_text.done", **where, text=part["text"], logprobs=[]),
                self._event("response.content_part.done", **where, part=part),
            ]
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            found = [
                self._event("response.function_call_arguments.delta", **where, delta=item["arguments"]),
                self._event("response.function_call_arguments.done", **where, **call),
            ]
        return [*found, self._event("response.output_item.done", output_index=index, item=item)]

    def _event(self, kind: str, **data: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **data}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(text: str, status: str, name: str | None = None) -> dict[str, Any]:
    content = [_part(text)]
    number = name or f"msg_{uuid.uuid4().hex}"
    return {"id": number, "type": "message", "role": "assistant", "status": status, "content": content}
