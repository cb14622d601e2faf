"""The tasks of the study: examples to train on, to choose learning rates by, and to score by, of the embedded model.

None of their prompts was in its pretraining. How they are learned is not known here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyreft import pocket
from pyreft.errors import ReftError, did_you_mean

Pair = tuple[str, str]
TASKS = {
    "emoji": "answer a question in emojis instead of words, from ten examples",
    "middle": "name the middle one of three words instead of repeating them, from 96 examples",
    "emoji-long": "the same as emoji, behind a conversation of four turns",
    "middle-long": "the same as middle, behind a conversation of four turns",
}
"""What is learned in each task."""
_LONG = "-long"


@dataclass(frozen=True)
class Task:
    """One task: pairs of what the model reads and of what it should answer.

    Args:
        train: to learn from.
        validation: to choose learning rates by.
        heldout: to score by; neither learned from nor used for any choice.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    heldout: tuple[Pair, ...]


def load_task(name: str) -> Task:
    """Return a task of `TASKS`."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "tasks.json").read_text("utf-8"))
    if name.removesuffix(_LONG) == "emoji":
        splits: list[list[Any]] = [
            [(row["prompt"], row["completion"]) for row in pocket.emoji_pairs()],
            found["emoji_validation"],
            [(row["prompt"], row["answer"]) for row in pocket.emoji_questions()],
        ]
    else:
        splits = [found["middle"][split] for split in ("train", "validation", "heldout")]
    turns = found["context"] if name.endswith(_LONG) else []
    context = "".join(f"{pocket.PROMPT_TEMPLATE % question}{answer}</s>" for question, answer in turns)
    return Task(*(tuple((context + pocket.PROMPT_TEMPLATE % prompt, answer) for prompt, answer in s) for s in splits))


def read_tasks(names: str | Sequence[str]) -> list[str]:
    """Return names of tasks from text such as `"emoji;middle"`, `"all"`, or a list.

    Raises:
        ReftError: there is no such task, or none is named.
    """
    if isinstance(names, str):
        names = list(TASKS) if names.strip() == "all" else names.replace(",", ";").split(";")
    chosen = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not chosen:
        raise ReftError(f"expected 'all' or some of {', '.join(TASKS)}, got none.", setting="tasks")
    for name in chosen:
        if name not in TASKS:
            raise ReftError(f"expected {', '.join(TASKS)}, got {name!r}.{did_you_mean(name, TASKS)}", setting="tasks")
    return chosen
