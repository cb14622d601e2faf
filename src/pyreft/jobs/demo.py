"""The demonstration: from ten emoji pairs to answers in emojis, on the embedded model or another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import pocket
from ..data.encode import prompt_text
from ..files.adapter import EMBEDDED
from ..generation import generate_answers
from ..loading import load_base
from ..model import ReftModel
from ..pocket import emoji_questions, emojis_only, has_emojis
from .job import PreparedJob
from .settings import TrainingJob

DATA = Path(pocket.__file__).parent / "data" / "emoji_train.jsonl"
# what the embedded model was found to learn best from so few pairs, within 20 kB
SETTINGS: dict[str, Any] = {
    "intervention": "loreft",
    "layers": "1;2;3",
    "positions": "l4",
    "rank": 4,
    "epochs": 100,
    "lr": 0.01,
    "batch_size": 10,
}
# of another model, where a step takes longer: the defaults
OTHERS: dict[str, Any] = {"epochs": 20, "batch_size": 10}


class EmojiDemo:
    """Asks fifty questions, trains on ten others, asks again, and compares.

    Args:
        output: the directory for the adapter.
        model: the base model, see `loading.load_base`.
        overwrite: replace an adapter that is there.
    """

    def __init__(self, output: str | Path, model: str | None = None, *, overwrite: bool = False) -> None:
        settings = SETTINGS if model in (None, EMBEDDED) else OTHERS
        job = TrainingJob(data=str(DATA), output=str(output), model=model, overwrite=overwrite, seed=0, **settings)
        self.prepared = PreparedJob(job)
        self.questions = emoji_questions()
        self.figures: dict[str, Any] = {}

    def ask(self, model: Any = None) -> list[str]:
        """The answers of a model to the fifty questions; by default those of the base model."""
        form = self.prepared.format
        texts = [prompt_text(self.prepared.tokenizer, question["prompt"], form) for question in self.questions]
        options: dict[str, Any] = {"batch_size": 50, "max_new_tokens": 32}
        if model is not None:
            return list(generate_answers(model, self.prepared.tokenizer, texts, **options))
        with self.prepared.model.disable_adapter():
            return list(generate_answers(self.prepared.model, self.prepared.tokenizer, texts, **options))

    def train(self, progress: Callable[[int, int, float | None], None] | None = None) -> None:
        """Train on the ten pairs and save the adapter."""
        self.figures = self.prepared.train(progress)

    def measure(self, before: list[str]) -> dict[str, Any]:
        """Return what changed, in numbers and answers, and whether a fresh model answers the same."""
        after = self.ask(self.prepared.model)
        fresh, _ = load_base(self.prepared.job.model)
        again = self.ask(ReftModel.load(self.prepared.output, fresh))
        core = [question["emojis"] for question in self.questions]
        rows = zip(self.questions, before, after, strict=True)
        return {
            "output": self.figures["output"],
            "seconds": self.figures["seconds"],
            "parameters": self.figures["parameters"],
            "model_parameters": fresh.num_parameters() - self.figures["parameters"],
            "bytes": (self.prepared.output / "adapter_model.safetensors").stat().st_size,
            "questions": len(self.questions),
            "before_in_emojis": sum(map(emojis_only, before)),
            "in_emojis": sum(map(emojis_only, after)),
            "right": sum(map(has_emojis, after, core)),
            "reload_identical": again == after,
            "answers": [{"question": q["prompt"], "before": b, "after": a} for q, b, a in rows],
        }
