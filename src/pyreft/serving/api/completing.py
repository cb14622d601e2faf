"""Chat and completions: what comes from the engine, written as the OpenAI API has it, whole or as a stream."""

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from ..laptop.requests import Piece, Request
from ..laptop.sampling import Choice
from .bodies import ChatBody, CompletionBody, Generating
from .faults import Fault
from .service import Asked
from .tools import take_calls


class Writing:
    """An answer in the making, of either kind.

    Args:
        asked: what is answered.
        body: the request.
    """

    prefix, whole, part = "", "", ""

    def __init__(self, asked: Asked, body: Generating, tokenizer: Any) -> None:
        self.asked, self.body, self.tokenizer = asked, body, tokenizer
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": None,
        }
        requests = asked.requests
        self.count = sum(request.n for request in requests)
        self.of = [request for request in requests for _ in range(request.n)]  # by answer
        self.prompt_tokens = asked.prompt_tokens

    def usage(self) -> dict[str, int]:
        """The counts of tokens."""
        read, made = self.prompt_tokens, self.asked.tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        texts, ends = [""] * self.count, [""] * self.count
        chosen: list[list[Choice]] = [[] for _ in range(self.count)]
        async for index, piece in self.asked.pieces():
            texts[index] += piece.text
            ends[index] = piece.finish or ""
            if piece.choice is not None:
                chosen[index].append(piece.choice)
        choices = [
            self.choice(index, text, own, end)
            for index, (text, own, end) in enumerate(zip(texts, chosen, ends, strict=True))
        ]
        return {**self.head, "object": self.whole, "choices": choices, "usage": self.usage()}

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """The answer as a stream of events."""
        options = getattr(self.body, "stream_options", None)
        counted = options is not None and options.include_usage
        more: dict[str, Any] = {"usage": None} if counted else {}
        try:
            for choice in self.openings():
                yield event({**self.head, "object": self.part, "choices": [choice], **more})
            async for index, piece in pieces:
                for choice in self.steps(index, piece):
                    yield event({**self.head, "object": self.part, "choices": [choice], **more})
        except Fault as fault:  # the answer stays without an end
            yield event(fault.body())
            return
        if self.asked.outcome != "done":  # the client has gone
            return
        if counted:
            yield event({**self.head, "object": self.part, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def choice(self, index: int, text: str, chosen: list[Choice], end: str) -> dict[str, Any]:
        """One whole answer."""
        raise NotImplementedError

    def openings(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def steps(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to a stream."""
        raise NotImplementedError

    def token(self, token: int) -> str:
        """A token as text."""
        return self.tokenizer.decode([token])


class ChatWriting(Writing):
    """`/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatBody

    @property
    def calls(self) -> bool:
        """Whether an answer may call tools."""
        return bool(self.body.tools) and self.body.tool_choice != "none"

    def choice(self, index: int, text: str, chosen: list[Choice], end: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            message["content"], calls = take_calls(text, self.body.parallel_tool_calls)
            if calls:
                end = "tool_calls"
                message |= {"tool_calls": calls, "content": message["content"] or None}
        logprobs = self.logprobs(chosen)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": end}

    def openings(self) -> list[dict[str, Any]]:
        self._texts = [""] * self.count
        return [_delta(index, {"role": "assistant", "content": ""}) for index in range(self.count)]

    def steps(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        end, text = piece.finish, piece.text
        if self.calls:  # a call is only known once it is whole
            self._texts[index] += text
            text = ""
            if end:
                text, calls = take_calls(self._texts[index], self.body.parallel_tool_calls)
                end = "tool_calls" if calls else end
        found = []
        logprobs = self.logprobs([] if piece.choice is None else [piece.choice])
        if text or (logprobs and logprobs["content"]):
            found.append(_delta(index, {"content": text}, logprobs))
        if calls:
            found.append(_delta(index, {"tool_calls": [{"index": n, **call} for n, call in enumerate(calls)]}))
        if end:
            found.append({**_delta(index, {}), "finish_reason": end})
        return found

    def logprobs(self, chosen: list[Choice]) -> dict[str, Any] | None:
        """The probabilities of tokens, if they are asked for."""
        if not self.body.logprobs:
            return None
        ends = self.asked.service.engine.ends
        told = [
            {**self._told(one.token, one.logprob), "top_logprobs": [self._told(*top) for top in one.top]}
            for one in chosen
            if one.token not in ends  # which is not in the text
        ]
        return {"content": told, "refusal": None}

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionWriting(Writing):
    """`/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"
    body: CompletionBody

    def __init__(self, asked: Asked, body: CompletionBody, tokenizer: Any) -> None:
        super().__init__(asked, body, tokenizer)
        self._begun: set[int] = set()
        self._ends: Counter[int] = Counter()  # how far the text of each answer is

    def choice(self, index: int, text: str, chosen: list[Choice], end: str) -> dict[str, Any]:
        request = self.of[index]
        before = self._prompt(request) if self.body.echo else ""
        asked: list[Choice | None] = [None, *request.prompt_choices] if self.body.echo else []
        logprobs = self._logprobs(index, asked, chosen)
        return {"index": index, "text": before + text, "logprobs": logprobs, "finish_reason": end}

    def steps(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        request = self.of[index]
        first = index not in self._begun
        self._begun.add(index)
        before = self._prompt(request) if self.body.echo and first else ""
        asked: list[Choice | None] = [None, *request.prompt_choices] if self.body.echo and first else []
        logprobs = self._logprobs(index, asked, [] if piece.choice is None else [piece.choice])
        text = before + piece.text
        if not text and not piece.finish and not (logprobs and logprobs["tokens"]):
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}]

    def _prompt(self, request: Request) -> str:
        return self.tokenizer.decode(request.prompt, skip_special_tokens=True)

    def _logprobs(self, index: int, prompt: list[Choice | None], chosen: list[Choice]) -> dict[str, Any] | None:
        """The probabilities of further tokens of an answer, if they are asked for."""
        if self.body.logprobs is None:
            return None
        told: list[Choice] = [Choice(self.of[index].prompt[0]) if one is None else one for one in prompt]
        told += chosen  # the end, too, as vLLM has it: lm-eval takes the last for what was answered
        tokens = [self.token(one.token) for one in told]
        offsets = []
        for one in told:
            offsets.append(self._ends[index])
            self._ends[index] += len(self.tokenizer.decode([one.token], skip_special_tokens=True))
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [self._top(one) for one in told],
            "text_offset": offsets,
        }

    def _top(self, choice: Choice) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one by their texts; of those with one text the likeliest."""
        if choice.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, value in sorted({*choice.top, (choice.token, choice.logprob)}, key=lambda one: -one[1]):
            found.setdefault(self.token(token), value)
        return found


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event of a stream."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return (b"" if name is None else f"event: {name}\n".encode()) + b"data: " + text + b"\n\n"
