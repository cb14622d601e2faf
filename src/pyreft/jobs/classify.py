"""A training job for a task of GLUE: an encoder, an adapter and a classifier, of which the best epoch is kept."""

from typing import Any

from peft import TaskType
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed

from ..data.encode import context_length
from ..errors import ReftError
from ..loading import load_base
from ..tasks.glue import Pair, Task, find_task, read, split_validation
from ..tasks.metrics import METRICS
from ..training.checkpoints import CheckpointingClassifierTrainer
from ..tuner.config import ReftConfig
from .adapters import heads_of
from .job import PreparedJob


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
        if isinstance(self.config, ReftConfig):
            self.config.modules_to_save = heads_of(model)
        else:
            self.config.task_type, self.config.modules_to_save = TaskType.SEQ_CLS, heads_of(model)
        limit = context_length(model, self.tokenizer, job.max_length)
        self.rows = encode_pairs(self.tokenizer, self.task, pairs, limit)
        self.validation = encode_pairs(self.tokenizer, self.task, choosing, limit)
        self.collator = DataCollatorWithPadding(self.tokenizer)
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
        return score(self.task, answers(self.task, outputs), predicted.label_ids.tolist())


def encode_pairs(tokenizer: PreTrainedTokenizerBase, task: Task, pairs: list[Pair], limit: int) -> list[dict[str, Any]]:
    """Token rows of sentences, cut at a limit, each with its class or number as `labels`."""
    rows = []
    for pair in pairs:
        row = tokenizer(*pair.sentences, truncation=True, max_length=limit)
        rows.append({**row, "labels": pair.label if task.labels is None else int(pair.label)})
    return rows


def answers(task: Task, outputs: Any) -> list[float]:
    """What a classifier's outputs, `[examples, outputs]`, say: the number of the likeliest class, or the number."""
    return (outputs[:, 0] if task.labels is None else outputs.argmax(-1)).tolist()


def score(task: Task, found: list[float], truth: list[float]) -> dict[str, float]:
    """The task's metrics, by their names."""
    return {name: METRICS[name](found, truth) for name in task.metrics}
