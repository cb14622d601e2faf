"""The suites whose answers are generated: what is asked, in which words, and how an answer is read from the text.

Commonsense and arithmetic reasoning and instruction following, as in the ReFT paper (arXiv 2404.03592, tables 1 to 3).
What is trained with which settings is in `pyreft/recipes`; classification is in `glue`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.encode import Format
from ..data.files import Example, alpaca_prompt
from ..errors import ReftError, did_you_mean
from . import hub
from .answers import TRIGGER, choice, result
from .layouts import LLM_ADAPTERS, Row, answer_of, find, read_json, text_of

ULTRAFEEDBACK = "https://huggingface.co/datasets/openbmb/UltraFeedback, as rows of instruction, input and output"
ALPACA_EVAL = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval"


@dataclass(frozen=True)
class Question:
    """One question of a test set.

    Args:
        where: the file and row, for messages.
        instruction: what is asked.
        prompt: what the model reads.
        answer: the right answer; empty where a judge decides.
        source: the data set that the question comes from, as far as the file says it.
    """

    where: str
    instruction: str
    prompt: str
    answer: str = ""
    source: str = ""


@dataclass(frozen=True)
class Suite:
    """A table of the paper.

    Args:
        name: as in the commands.
        tasks: the folders of the test sets, in the order of the columns, with the columns' names.
        form: how prompts are written, as `ReftConfig.prompt_format` knows it.
        prompt: from an instruction and its input to what the model reads.
        completion: what is learned from a row of the training file.
        fields: which a row of the training file needs.
        files: where the training file may lie.
        source: where the data can be had.
        extract: from a generated text and the right answer to the answer it gives; none where a judge decides.
    """

    name: str
    tasks: dict[str, str]
    form: Format
    prompt: Callable[[str, str], str]
    completion: Callable[[Row], str]
    fields: tuple[str, ...]
    files: tuple[str, ...]
    source: str
    extract: Callable[[str, str], str] | None

    def examples(self, directory: str | Path | None, limit: int | None = None) -> list[Example]:
        """The examples to train on, the first `limit` of them; without a directory from the hub, where it has them.

        Raises:
            ReftError: data that is missing or of another layout, with its place.
        """
        if directory is None:
            rows = hub.load(self.name, "train", self.files[0], self.source)
        else:
            rows = read_json(find(directory, self.files, self.source), self.fields)
        return [self._example(row) for row in rows[:limit]]

    def questions(self, task: str, directory: str | Path | None, limit: int | None = None) -> list[Question]:
        """The questions of a test set, the first `limit` of them.

        Raises:
            ReftError: as `examples`, or a task that is not of this suite.
        """
        if task not in self.tasks:
            raise ReftError(
                f"{self.name} has {', '.join(self.tasks)}, got {task!r}.{did_you_mean(task, self.tasks)}",
                setting="task",
            )
        places = (f"{task}/test.json", f"dataset/{task}/test.json", f"{task}/test.jsonl", f"{task}.json")
        if directory is None:
            rows = hub.load(task, "test", places[0], self.source)
        else:
            path = find(directory, places, self.source)
            if path.suffix == ".jsonl":
                rows = [_worked(row) for row in read_json(path, ("question", "answer"))]
            else:
                rows = read_json(path, ("instruction", "answer") if self.extract else ("instruction",))
        return [self._question(row) for row in rows[:limit]]

    def _example(self, row: Row) -> Example:
        prompt = self.prompt(text_of(row, "instruction"), _input(row))
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": self.completion(row)})
        return Example(row.where, "text", turns)  # as it stands

    def _question(self, row: Row) -> Question:
        instruction, given = text_of(row, "instruction"), _input(row)
        answer = answer_of(row) if self.extract else ""
        return Question(
            row.where, instruction, self.prompt(instruction, given), answer, str(row.fields.get("dataset", ""))
        )


def _input(row: Row) -> str:
    return text_of(row, "input") if row.fields.get("input") else ""


def _worked(row: Row) -> Row:
    """A row of GSM8K's own file, whose answer is worked out and ends in `#### 18`."""
    _, mark, answer = text_of(row, "answer").rpartition("####")
    if not mark:
        raise ReftError(f"{row.where}: the field 'answer' should end in '#### ' and a number.")
    return Row(row.where, {"instruction": row.fields["question"], "answer": answer.strip().replace(",", "")})


def _training_files(name: str) -> tuple[str, ...]:
    return f"{name}.json", f"ft-training_set/{name}.json", f"{name}/train.json"


COMMONSENSE = Suite(
    name="commonsense",
    tasks={
        "boolq": "BoolQ",
        "piqa": "PIQA",
        "social_i_qa": "SIQA",
        "hellaswag": "HellaSwag",
        "winogrande": "WinoGrande",
        "ARC-Easy": "ARC-e",
        "ARC-Challenge": "ARC-c",
        "openbookqa": "OBQA",
    },
    form="text",
    prompt=lambda instruction, given: f"{instruction}\n",
    completion=lambda row: TRIGGER + answer_of(row),
    fields=("instruction", "answer"),
    files=_training_files("commonsense_170k"),
    source=LLM_ADAPTERS,
    extract=lambda text, answer: choice(text),
)
ARITHMETIC = Suite(
    name="arithmetic",
    tasks={"AQuA": "AQuA", "gsm8k": "GSM8K", "mawps": "MAWPS", "SVAMP": "SVAMP"},
    form="alpaca",
    prompt=lambda instruction, given: alpaca_prompt(instruction),
    completion=lambda row: text_of(row, "output", empty=True),
    fields=("instruction", "output"),
    files=_training_files("math_10k"),
    source=LLM_ADAPTERS,
    extract=result,
)
INSTRUCT = Suite(
    name="instruct",
    tasks={"alpaca_eval": "AlpacaEval"},
    form="alpaca",
    prompt=alpaca_prompt,
    completion=lambda row: text_of(row, "output", empty=True),
    fields=("instruction", "output"),
    files=("ultrafeedback/train.json", "ultrafeedback.json", "alpaca_data_cleaned/train.json"),
    source=f"{ULTRAFEEDBACK}; the questions from {ALPACA_EVAL}",
    extract=None,
)
GENERATED = {suite.name: suite for suite in (COMMONSENSE, ARITHMETIC, INSTRUCT)}
GLUE = "glue"
SUITES = (*GENERATED, GLUE)


def check_suite(name: object, where: str | None = None) -> str:
    """Return the name of a suite if there is one.

    Raises:
        ReftError: there is none of that name; the message begins with `where` it was given, if that is said.
    """
    if name not in SUITES:
        known = ", ".join(SUITES)
        raise ReftError(f"expected {known}, got {name!r}.{did_you_mean(name, SUITES)}", setting="suite", where=where)
    return str(name)
