"""A task of GLUE: an encoder, an adapter and a classifier, of which the best epoch is kept; and their scores."""

from typing import Any

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase, set_seed

from ..data.encode import context_length
from ..data.padding import pads_classified
from ..errors import ReftError
from ..loading import load_base
from ..tasks.glue import Pair, Task, find_task, read, split_validation
from ..tasks.metrics import METRICS
from ..training.checkpointing import CheckpointingClassifierTrainer
from ..tuner.config import ReftConfig
from .job import PreparedJob
from .methods import classifier_of


class PreparedClassifier(PreparedJob):
    """A job for a task of GLUE.

    The epochs are measured on one part of the validation set, and the best one is saved; the other part is for
    `pyreft eval` alone. See `tasks.glue.split_validation`.
    """

    trainer_class = CheckpointingClassifierTrainer

    def _prepare(self) -> None:
        job = self.job
        if not job.task:
            raise ReftError("name the task of GLUE that is trained.", setting="task")
        for name in ("validation", "validation_split", "save_steps", "format"):
            if getattr(job, name):
                raise ReftError("GLUE has its own; leave it out.", setting=name)
        self.task: Task = find_task(job.task)
        pairs = read(self.task, "train", job.data_dir, job.limit)
        choosing, _ = split_validation(read(self.task, "validation", job.data_dir), job.seed)
        self.examples = []
        self.format = "text"
        set_seed(job.seed)
        model, self.tokenizer = load_base(job.model, job.dtype, self.task.outputs)
        self.config.modules_to_save = classifier_of(model)
        if not isinstance(self.config, ReftConfig):
            self.config.task_type = TaskType.SEQ_CLS
        limit = context_length(model, self.tokenizer, job.max_length)
        self.rows = encode_pairs(self.tokenizer, self.task, pairs, limit)
        self.validation = encode_pairs(self.tokenizer, self.task, choosing, limit)
        self.collator = pads_classified(self.tokenizer)
        self.options = {
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": self.task.metrics[0],
            "greater_is_better": True,
        }
        self._attach(model)

    def compute_metrics(self, predicted: Any) -> dict[str, float]:
        """The task's metrics of the Trainer's predictions."""
        outputs = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        return score(self.task, predictions(self.task, outputs), predicted.label_ids.tolist())


def encode_pairs(tokenizer: PreTrainedTokenizerBase, task: Task, pairs: list[Pair], limit: int) -> list[dict[str, Any]]:
    """Token rows of sentences, cut at a limit, each with its class or number as `labels`."""
    rows = []
    for pair in pairs:
        row = tokenizer(*pair.sentences, truncation=True, max_length=limit)
        rows.append({**row, "labels": pair.label if task.labels is None else int(pair.label)})
    return rows


def classify(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, pairs: list[Pair], *, most: int, batch_size: int
) -> dict[str, Any]:
    """Classify sentences and score what was found, in percent.

    Args:
        model: an adapted classifier.
        most: how many tokens of a row are read, within the model's context.

    Returns:
        The `score`, its `metric`, all `metrics`, the `count` and the `answers`, as `evaluate` has them.
    """
    rows = encode_pairs(tokenizer, task, pairs, min(most, context_length(model.get_base_model(), tokenizer)))
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        part = [{k: v for k, v in row.items() if k != "labels"} for row in rows[start : start + batch_size]]
        batch = tokenizer.pad(part, padding_side="right", return_tensors="pt").to(model.device)
        with torch.no_grad():
            found += predictions(task, model(**batch).logits.float())
    metrics = {name: 100 * value for name, value in score(task, found, [pair.label for pair in pairs]).items()}
    answers = [
        {"sentences": pair.sentences, "found": value, "label": pair.label}
        for pair, value in zip(pairs, found, strict=True)
    ]
    first = task.metrics[0]
    return {"metric": first, "score": metrics[first], "metrics": metrics, "count": len(pairs), "answers": answers}


def predictions(task: Task, outputs: Any) -> list[float]:
    """What a classifier's outputs, `[examples, outputs]`, say: the number of the likeliest class, or the number."""
    return (outputs[:, 0] if task.labels is None else outputs.argmax(-1)).tolist()


def score(task: Task, found: list[float], truth: list[float]) -> dict[str, float]:
    """The task's metrics, by their names."""
    return {name: METRICS[name](found, truth) for name in task.metrics}
