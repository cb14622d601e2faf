"""Who computes when: requests wait in a queue, are read in, and answered together, token by token.

One thread takes turn after turn. In each turn, the first in the queue are admitted if there is room for them; a part of
their prompts is read; every answer that runs gets one token. A long prompt is read in parts, so that answers go on
meanwhile. Whoever has read joins those that answer, whoever has ended, or whose client has gone, leaves at once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ReftError
from .requests import Piece, Request
from .sampling import Sampler, told
from .side_by_side import Batch
from .slotted import Edits
from .writing import Writer

_log = logging.getLogger(__name__)
LATE = "The time for this request is over."


class QueueFull(Exception):
    """More requests wait than the queue holds."""


class Answer:
    """One answer while it grows."""

    def __init__(self, request: Request, index: int, tokenizer: Any) -> None:
        self.request, self.index = request, index
        self.sampler = Sampler(request.sampling, request.prompt, index)
        self.writer = Writer(tokenizer, request.stop)
        self.count = 0  # of its tokens
        self.last = 0  # of them
        self.finish: str | None = None

    def take(self, logits: Tensor) -> None:
        """Choose the next token by the logits `[vocabulary]` behind the last, and deliver what is known then."""
        request, choice, text = self.request, None, ""
        if request.most:
            try:
                choice = self.sampler.choose(logits)
                text = "" if choice.token in request.ends else self.writer.add(choice.token)
            except Exception as error:  # of this answer alone, such as no finite logits to draw from
                _log.exception("no token could be chosen")
                return self.fail("error", _said(error))
            self.count, self.last = self.count + 1, choice.token
            if choice.token in request.ends:
                self.finish = "stop"
        if self.finish is None and (self.writer.stopped or self.count >= request.most):
            self.finish = "length"
        if self.finish:
            text += self.writer.end()
        if self.writer.stopped:
            self.finish = "stop"
        request.deliver(Piece(self.index, text, choice, self.finish))

    def fail(self, finish: str, problem: str) -> None:
        """End it without a whole answer."""
        if self.finish is None:
            self.finish = finish
            self.request.deliver(Piece(self.index, "", None, finish, problem))


@dataclass
class _Reading:
    """Prompts that are read in together."""

    batch: Batch
    requests: list[Request]
    ids: Tensor  # `[requests, columns]`, padded on the left


class Scheduler:
    """Answers requests with one model.

    Args:
        model, tokenizer: what answers.
        edits: on this model.
        rows: how many answers grow at once.
        queue: how many requests may wait.
        room: for how many tokens, rows times columns, keys and values are kept.
        part: how many tokens of prompts, rows times columns, are read in one turn.
    """

    def __init__(
        self, model: Any, tokenizer: Any, edits: Edits, *, rows: int = 16, queue: int = 64, room: int, part: int = 512
    ) -> None:
        self.model, self.tokenizer, self.edits = model, tokenizer, edits
        self.rows, self.queue, self.room, self.part = rows, queue, room, part
        self._waiting: deque[Request] = deque()
        self._reading: _Reading | None = None
        self._batch: Batch | None = None
        self._answers: list[Answer] = []  # of the rows of the batch
        self._change = threading.Condition()
        self._ends: str | None = None  # "finish" what is here, or end "now"
        self._thread = threading.Thread(target=self._run, name="pyreft-scheduler", daemon=True)

    # -- for other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request into the queue.

        Raises:
            ReftError: one that can never be answered here.
            QueueFull: too many wait, or the engine ends.
        """
        if request.n > self.rows:
            raise ReftError(f"expected at most {self.rows} answers, got {request.n}.", setting="n")
        if request.n * request.longest > self.room:
            raise ReftError(
                f"prompt and answers may have {self.room} tokens together, these may have "
                f"{request.n * request.longest}; ask for fewer.",
                setting="max_tokens",
            )
        with self._change:
            if self._ends or len(self._waiting) >= self.queue:
                raise QueueFull
            self._waiting.append(request)
            self._change.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more: its place is free before the next token."""
        with self._change:
            request.gone = True
            self._change.notify()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no further requests; give those that are here so many seconds, then end them with an error."""
        with self._change:
            self._ends = "finish" if seconds > 0 else "now"
            self._change.notify()
        if self.alive:
            self._thread.join(seconds)
        with self._change:
            self._ends = "now"
        if self.alive:
            self._thread.join()

    @property
    def counts(self) -> dict[str, int]:
        """How many requests wait, how many are read in, and how many answers grow."""
        reading = self._reading
        running = len(self._answers)
        return {"waiting": len(self._waiting), "reading": len(reading.requests) if reading else 0, "running": running}

    @property
    def alive(self) -> bool:
        """Whether turns are taken."""
        return self._thread.is_alive()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._reading or self._answers or self._ends):
                    self._change.wait()
                if self._ends and (self._ends == "now" or not (self._waiting or self._reading or self._answers)):
                    break
            self.turn()
        for request in [*self._waiting, *(self._reading.requests if self._reading else ())]:
            _fail(request, "error", "The server ends.")
        for answer in self._answers:
            answer.fail("error", "The server ends.")

    def turn(self) -> None:
        """One turn. What goes wrong while prompts are read fails these requests alone."""
        self._give_up()
        if self._reading is None:
            self._admit()
        behind: Tensor | None = None
        if (reading := self._reading) is not None:
            try:
                behind = self._read(reading)
            except Exception as error:
                _log.exception("prompts could not be read")
                self._reading = None
                for request in reading.requests:
                    self._release(request)
                    _fail(request, "error", _said(error))
        if self._answers or behind is not None:
            try:
                if behind is not None and reading is not None:
                    self._begin(reading, behind)
                if self._answers:
                    self._answer()
            except Exception as error:
                _log.exception("a step failed")
                for answer in self._answers:
                    answer.fail("error", _said(error))
        self._leave()

    def _give_up(self) -> None:
        """Let go of requests whose client has gone or whose time is over."""
        now = time.monotonic()
        with self._change:
            waiting, self._waiting = self._waiting, deque()
            for request in waiting:
                if now > request.deadline:
                    _fail(request, "timeout", LATE)
                elif not request.gone:
                    self._waiting.append(request)
        if (reading := self._reading) is not None:
            for request in reading.requests:
                if now > request.deadline and not request.gone:
                    request.gone = True
                    _fail(request, "timeout", LATE)
            if any(request.gone for request in reading.requests):
                self._keep_reading([n for n, request in enumerate(reading.requests) if not request.gone])
        for answer in self._answers:
            if now > answer.request.deadline:
                answer.fail("timeout", LATE)
            elif answer.request.gone:
                answer.finish = "gone"
        self._leave()

    def _keep_reading(self, kept: Sequence[int]) -> None:
        reading = self._reading
        assert reading is not None
        for number, request in enumerate(reading.requests):
            if number not in kept:
                self._release(request)
        if not kept:
            self._reading = None
            return
        columns = reading.batch.columns
        reading.batch.select(kept)
        reading.ids = reading.ids[list(kept), columns - reading.batch.columns :]
        reading.requests = [reading.requests[number] for number in kept]

    def _admit(self) -> None:
        """Begin to read the prompts of the first in the queue, as many as have room and are of similar length."""
        taken: list[Request] = []
        rows = []
        while self._waiting:
            request = self._waiting[0]
            if not self._has_room([*taken, request]):
                break
            with self._change:
                self._waiting.popleft()
            try:
                adapter = request.adapter
                row = None if adapter is None else self.edits.take(adapter, len(request.prompt), request.strength)
            except Exception as error:  # of this request alone, such as a copy that was deleted
                _fail(request, "error", _said(error))
                continue
            taken.append(request)
            rows.append(row)
        if taken:
            width = max(len(request.prompt) for request in taken)
            ids = torch.tensor([[0] * (width - len(request.prompt)) + request.prompt for request in taken])
            batch = Batch(self.model, self.edits, [len(request.prompt) for request in taken], rows)
            self._reading = _Reading(batch, taken, ids)

    def _has_room(self, more: list[Request]) -> bool:
        """Whether these can be read together and then be answered beside those that are."""
        new, lengths = more[-1], [len(request.prompt) for request in more]
        if len(more) > 1 and max(lengths) * len(lengths) > max(self.part, 1.25 * sum(lengths)):
            return False  # much of it would be padding
        rows = len(self._answers) + sum(request.n for request in more)
        longest = max(request.longest for request in (*more, *(answer.request for answer in self._answers)))
        if rows > self.rows or rows * longest > self.room:
            return False
        return new.adapter is None or self.edits.slots.has_room(new.adapter.digest)

    def _read(self, reading: _Reading) -> Tensor | None:
        """Read a part of the prompts; return the logits `[requests, vocabulary]` behind them once all is read."""
        batch, requests = reading.batch, reading.requests
        begin = batch.columns
        ids = reading.ids[:, begin : begin + max(1, self.part // len(requests))]
        telling = any(request.told_prompt is not None for request in requests)
        logits = batch.compute(ids, last=not telling)
        if telling:
            for number, request in enumerate(requests):
                _tell_prompt(request, logits[number], int(batch.first[number]), begin)
        return logits[:, -1] if batch.columns == reading.ids.shape[1] else None

    def _begin(self, reading: _Reading, behind: Tensor) -> None:
        """Prompts have been read: their answers get their first tokens, and join those that grow."""
        batch = reading.batch
        rows = [number for number, request in enumerate(reading.requests) for _ in range(request.n)]
        own = [Answer(request, index, self.tokenizer) for request in reading.requests for index in range(request.n)]
        self._reading = None
        self._answers += own  # now, so that whatever goes wrong is told to them, too
        batch.select(rows)
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)
        for answer, number in zip(own, rows, strict=True):
            answer.take(behind[number])
        self._leave()

    def _answer(self) -> None:
        """One more token for every answer."""
        assert self._batch is not None
        logits = self._batch.compute(torch.tensor([[answer.last] for answer in self._answers]))[:, -1]
        for answer, behind in zip(self._answers, logits, strict=True):
            answer.take(behind)

    def _leave(self) -> None:
        """Answers that have ended give up their rows, and requests all of whose answers have their slots."""
        kept = [number for number, answer in enumerate(self._answers) if answer.finish is None]
        if len(kept) == len(self._answers):
            return
        left = [self._answers[number] for number in kept]
        for request in {answer.request for answer in self._answers} - {answer.request for answer in left}:
            self._release(request)
        self._answers = left
        if not kept:
            self._batch = None
        elif self._batch is not None:
            self._batch.select(kept)

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self.edits.release(request.adapter)


def _tell_prompt(request: Request, logits: Tensor, first: int, begin: int) -> None:
    """Note what the model thought of the prompt's tokens behind the columns `begin` and on, of these logits."""
    if request.told_prompt is None:
        return
    for column, behind in enumerate(logits, begin):
        following = column - first + 1
        if 1 <= following < len(request.prompt):
            request.prompt_choices.append(told(behind.cpu(), request.prompt[following], request.told_prompt))


def _fail(request: Request, finish: str, problem: str) -> None:
    for index in range(request.n):
        request.deliver(Piece(index, "", None, finish, problem))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ReftError) else "The engine could not compute this request."
