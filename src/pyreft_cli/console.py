"""What the commands share in printing: a console, a progress bar, JSON for machines."""

import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


def hush() -> None:
    """Keep the libraries' own bars and notices out of the output; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torch.utils.data")
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT asks for it
    warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def counted(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_json(data: Any) -> None:
    """Print JSON on standard output."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(data, ensure_ascii=not unicode, indent=1))


def speak_plainly() -> None:
    """Let what a terminal or a file cannot show be written as its number, such as `\\U0001f431`.

    Bytes of the input that are no text come as halves of characters, of which is told where they are used.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress_bar(title: str, *, shown: bool, unit: str = "steps") -> Iterator[Any]:
    """Yield a function `(done, total, loss or none)` that moves a bar on standard error; its first call shows it.

    Where that is no terminal, a line is written after each tenth instead, or after each minute.
    """
    told = Console(stderr=True)
    if shown and not told.is_terminal:
        yield _Lines(title, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=told, disable=not shown)

    def move(done: int, total: int | None, loss: float | None = None) -> None:
        bar.start()
        (task,) = bar.task_ids or [bar.add_task(title, total=None, loss="")]
        bar.update(task, completed=done, total=total, loss=_loss(loss))

    try:
        yield move
    finally:
        if bar.tasks:
            bar.stop()


class _Lines:
    """Progress in lines, for a file or a log."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.first: int | None = None  # that was done when the time began
        self.begun = self.told = time.monotonic()
        self.tenths = 0

    def __call__(self, done: int, total: int | None, loss: float | None = None) -> None:
        now = time.monotonic()
        if not total:
            return
        if self.first is None:
            self.first, self.begun, self.told, self.tenths = done, now, now, 10 * done // total
        if 10 * done // total <= self.tenths and now - self.told < 60:
            return
        self.tenths, self.told = 10 * done // total, now
        words = [f"{self.title}: {done:,} of {total:,} {self.unit}", _loss(loss), f"{_clock(now - self.begun)} gone"]
        if self.first < done < total:
            words.append(f"about {_clock((now - self.begun) * (total - done) / (done - self.first))} left")
        print(", ".join(filter(None, words)), file=sys.stderr, flush=True)


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
