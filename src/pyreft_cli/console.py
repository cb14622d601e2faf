"""What the commands share in printing: a console, a progress bar, JSON for machines."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
    print(json.dumps(data, ensure_ascii=False, indent=1))


@contextmanager
def progress_bar(title: str, *, shown: bool, unit: str = "steps") -> Iterator[Any]:
    """Yield a function `(done, total, loss or none)` that moves a bar on standard error; its first call shows it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)

    def move(done: int, total: int | None, loss: float | None = None) -> None:
        bar.start()
        (task,) = bar.task_ids or [bar.add_task(title, total=None, loss="")]
        bar.update(task, completed=done, total=total, loss="" if loss is None else f"loss {loss:.3f}")

    try:
        yield move
    finally:
        if bar.tasks:
            bar.stop()
