"""From the fields of a request to what the engine computes, and its pieces as they come back."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request as Http
from jinja2 import TemplateError

from ...data.boundary import Chat
from ...data.encode import chat_text, token_ids
from ...errors import ReftError, did_you_mean
from ..catalog import Catalog
from ..laptop.engine import Engine
from ..laptop.requests import Piece, Request
from ..laptop.scheduling import QueueFull
from ..served import Adapter
from .bodies import ChatBody, Choosing, CompletionBody, Generating, Message, ResponseBody
from .faults import Fault, not_served, unknown_model
from .gauges import Gauges
from .tools import check_shows_calls, check_takes_tools, template_message

Allowed = frozenset[str] | None
_CHOOSING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Args:
        prompt: tokens of a prompt, none for what the model takes.
        tokens: tokens of an answer, none for what the model takes.
        seconds: for which a request may wait and be answered, together.
    """

    prompt: int | None = None
    tokens: int | None = None
    seconds: float = 600.0


class Service:
    """A base model and its adapters under their names.

    Args:
        engine: what computes.
        catalog: the adapters' names.
        name: that of the base model.
        limits: what is taken at most.

    Raises:
        ReftError: an adapter has the base model's name.
    """

    def __init__(self, engine: Engine, catalog: Catalog, name: str, limits: Limits = Limits()) -> None:
        self.engine, self.catalog, self.name, self.limits = engine, catalog, name, limits
        self.began = int(time.time())
        self.ending = False
        self._encoding = threading.Lock()  # a tokenizer serves one thread at a time
        if name in catalog.names():
            raise ReftError(f"an adapter has the base model's name {name!r}; give another --name.", setting="name")
        scheduler, edits = engine.scheduler, engine.edits
        self.gauges = Gauges(
            {
                "requests_waiting": ("Requests in the queue", lambda: scheduler.counts["waiting"]),
                "requests_reading": ("Requests whose prompts are read", lambda: scheduler.counts["reading"]),
                "answers_running": ("Answers that grow", lambda: scheduler.counts["running"]),
                "adapters_in_slots": ("Adapters in memory", lambda: len(edits.slots.of)),
                "adapter_loads": ("How often an adapter was put into a slot", lambda: edits.loads),
            }
        )

    def names(self, allowed: Allowed) -> list[str]:
        """The models that a client may ask, the base model first."""
        return [name for name in (self.name, *self.catalog.names()) if allowed is None or name in allowed]

    def adapter(self, name: str, allowed: Allowed) -> Adapter | None:
        """The adapter of a model's name, none for the base model.

        Raises:
            Fault: no such model, or one that cannot be served.
        """
        if allowed is None or name in allowed:
            if name == self.name:
                return None
            with suppress(KeyError):
                try:
                    return self.catalog.resolve(name)
                except (ReftError, OSError) as error:
                    raise not_served(name, error) from None
        known = did_you_mean(name, self.names(allowed))
        raise unknown_model(f"The model {name[:200]!r} does not exist.{known}")

    def prompt_of(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt.

        Raises:
            ReftError: one that the model cannot take.
            Fault: one above the limit.
        """
        if isinstance(prompt, str):
            prompt.encode()  # half of a character raises here by its name, in a tokenizer otherwise
            with self._encoding:
                prompt = token_ids(self.engine.tokenizer, prompt)
        self.engine.check_prompt(prompt)
        if self.limits.prompt is not None and len(prompt) > self.limits.prompt:
            raise Fault(400, f"The prompt has {len(prompt)} tokens, the limit is {self.limits.prompt}.", "prompt")
        return prompt

    def chat_prompt(self, messages: Sequence[Message], tools: list[dict] | None = None) -> list[int]:
        """The ids of a chat, in the tokenizer's template.

        Raises:
            ReftError: there is no template, the model cannot take the prompt, or not the tools.
            Fault: a chat that the template refuses.
        """
        turns = [template_message(message) for message in messages]
        tokenizer = self.engine.tokenizer
        try:
            if tools:
                check_takes_tools(tokenizer)
                text = Chat(
                    tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True)
                )
            else:
                text = chat_text(tokenizer, turns)
        except (TemplateError, TypeError) as error:
            raise Fault(400, f"The model's chat template refuses these messages: {error}", "messages") from None
        check_shows_calls(turns, text)
        return self.prompt_of(text)

    def request(
        self, body: Choosing, prompt: list[int], adapter: Adapter | None, deliver: Callable[[Piece], None]
    ) -> Request:
        """Make what the engine computes of a request's fields."""
        given: dict[str, Any] = {name: value for name in _CHOOSING if (value := getattr(body, name, None)) is not None}
        given["top_k"] = max(0, given.get("top_k", self.engine.sampling.top_k))
        most, told_prompt, limited = self.engine.context - len(prompt), None, "max_tokens"
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens or body.max_tokens
            limited = "max_completion_tokens" if body.max_completion_tokens else limited
            given["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        elif isinstance(body, CompletionBody):
            asked, given["logprobs"] = body.max_tokens, body.logprobs
            told_prompt = body.logprobs if body.echo else None
        else:
            asked = body.max_output_tokens if isinstance(body, ResponseBody) else None
            limited = "max_output_tokens"
        limit = most if self.limits.tokens is None else min(most, self.limits.tokens)
        if asked is not None and asked > limit:
            raise ReftError(f"expected at most {limit} beside this prompt, got {asked}.", setting=limited)
        request = Request(
            prompt,
            deliver,
            adapter,
            strength=1.0 if body.reft_strength is None else body.reft_strength,
            most=min(limit, self.engine.most or limit) if asked is None else asked,
            ends=self.engine.ends,
            told_prompt=told_prompt,
            deadline=time.monotonic() + self.limits.seconds,
        )
        if isinstance(body, Generating):
            given["bias"] = self._bias(body.logit_bias or {})
            request.stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
            request.n = body.n or 1
            request.ends = frozenset() if body.ignore_eos else request.ends
        request.sampling = replace(self.engine.sampling, **given)
        return request

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        vocabulary = self.engine.model.config.get_text_config().vocab_size
        for token in given:
            if not token.isdecimal() or len(token) > 20 or int(token) >= vocabulary:
                raise ReftError(
                    f"expected tokens from 0 to {vocabulary - 1}, got {token[:40]!r}.", setting="logit_bias"
                )
        return {int(token): value for token, value in given.items()}


class Asked:
    """The requests of one HTTP request, and their pieces as they come.

    Args:
        service: whose engine answers.
        http: the request; when its client goes, the requests end.
        model: the name that it asks for.
    """

    def __init__(self, service: Service, http: Http, model: str) -> None:
        self.service, self.http, self.model = service, http, model
        self.requests: list[Request] = []
        self.tokens = 0  # that were answered
        self.outcome = "cancelled"
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._gone: asyncio.Task | None = None
        self._began = time.monotonic()

    def deliver(self, offset: int) -> Callable[[Piece], None]:
        """What takes the pieces of a request whose answers are numbered from `offset`; for the engine's thread."""

        def take(piece: Piece) -> None:
            with suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (offset + piece.index, piece))

        return take

    def submit(self, requests: Sequence[Request]) -> None:
        """Have these answered.

        Raises:
            ReftError: one that can never be answered here.
            Fault: too many wait.
        """
        self.requests, self.outcome = list(requests), "refused"
        try:
            for request in requests:
                self.service.engine.submit(request)
        except QueueFull:
            self.end()
            if self.service.ending:
                raise Fault(503, "The server ends.", code="ending") from None
            raise Fault(
                429, "Too many requests wait; ask again later.", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except ReftError:
            self.end()
            raise
        self.outcome = "cancelled"
        self._gone = asyncio.create_task(self._watch())

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what becomes known, with the number of the answer; ends when all have ended or the client has gone.

        Raises:
            Fault: one of the requests failed.
        """
        gauges, running = self.service.gauges, sum(request.n for request in self.requests)
        while running and (found := await self._queue.get()) is not None:
            piece = found[1]
            if piece.finish in ("timeout", "error"):
                self.outcome = piece.finish
                raise Fault(504 if piece.finish == "timeout" else 500, piece.problem, code=piece.finish)
            if piece.choice is not None:
                if not self.tokens:
                    gauges.first.labels(self.model).observe(time.monotonic() - self._began)
                self.tokens += 1
            running -= piece.finish is not None
            if not running:
                self.outcome = "done"
            yield found

    def end(self) -> None:
        """Whatever still runs is let go, and the figures are noted; a second time, nothing."""
        if not self.requests:
            return
        gauges = self.service.gauges
        gauges.requests.labels(self.model, self.outcome).inc()
        if self.outcome != "refused":  # of which nothing was computed
            gauges.prompt_tokens.labels(self.model).inc(self.prompt_tokens)
            gauges.answer_tokens.labels(self.model).inc(self.tokens)
            gauges.whole.labels(self.model).observe(time.monotonic() - self._began)
        for request in self.requests:
            self.service.engine.scheduler.cancel(request)
        self.requests = []
        if self._gone is not None:
            self._gone.cancel()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompts have."""
        return sum(len(request.prompt) for request in self.requests)

    async def _watch(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)
