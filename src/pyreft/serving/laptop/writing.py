"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop."""

from collections.abc import Sequence
from typing import Any


class Writer:
    """The text of one answer.

    Args:
        tokenizer: whose special tokens are left out.
        stop: texts at whose first occurrence the answer ends, without them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = 0  # what is decoded again for its surroundings; what is written already
        self._held = ""  # may be the beginning of a stop
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        self._ids.append(token)
        known, whole = (self._decode(self._ids[self._from : end]) for end in (self._read, None))
        if len(whole) <= len(known) or whole.endswith("\ufffd"):  # a part of a character
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(whole[len(known) :])

    def end(self) -> str:
        """No further token comes; return the rest of the text."""
        known, whole = (self._decode(self._ids[self._from : end]) for end in (self._read, None))
        self._from = self._read = len(self._ids)
        text = self._release(whole[len(known) :])
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
