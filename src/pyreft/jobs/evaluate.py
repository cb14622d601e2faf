"""A suite's row for an adapter: its test sets are answered, the answers scored, and the paper's row put beside it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.encode import context_length, token_ids
from ..errors import ReftError
from ..files.adapter import is_adapter
from ..files.record import read_record
from ..generation import generate_answers
from ..loading import base_of, check_adapter, check_generates, check_language_model, check_rules, load_adapted
from ..places.structure import PREFIX
from ..tasks.answers import same
from ..tasks.figures import paper_row
from ..tasks.glue import TASKS, Pair, find_task, read, split_validation
from ..tasks.suites import GENERATED, GLUE, Question, Suite, check_suite
from .classify import classify
from .methods import count_saved, title
from .recipes import read_decoding

Progress = Callable[[int, int], None]
GLUE_LENGTH = 256  # the paper's, for an adapter without a record
Results = dict[str, dict[str, Any]]  # by task


@dataclass(frozen=True)
class _Asked:
    """What is evaluated, and how; see `evaluate`."""

    adapter: Path
    data_dir: str | Path | None
    tasks: Sequence[str]
    model: str | None
    dtype: str | None
    batch_size: int
    limit: int | None
    progress: Progress

    def load(self, place: Path, labels: int | None = None) -> tuple[Any, Any]:
        """An adapter on its base model, which by default has the type that it had in training."""
        return load_adapted(place, self.model, self.dtype or read_record(place).get("dtype", "auto"), labels)


def evaluate(
    adapter: str | Path,
    suite: str,
    data_dir: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    model: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    decoding: dict[str, Any] | None = None,
    seed: int = 42,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score an adapter on the tasks of a suite.

    Args:
        adapter: the adapter's directory; for GLUE, whose tasks have an adapter each, perhaps the directory of them.
        suite: `commonsense`, `arithmetic`, `instruct` or `glue`.
        data_dir: see `tasks.suites.Suite.questions` and `tasks.glue.read`.
        tasks: some of the tasks; all if none is named, of GLUE those that have an adapter.
        model: the base model, if not the one that the adapter remembers.
        dtype: of the base model, see `loading.load_base`; by default as in training.
        limit: only the first so many questions of each task.
        decoding: arguments of `generate`, instead of those of the adapter's own recipe, or of the suite's shipped one.
        seed: for drawn tokens. How GLUE's validation set is parted, the adapter's own record says.
        output: a directory for the answers, a JSON file for each task; those of `instruct` as AlpacaEval takes them.
        progress: called with how many questions are done and how many there are.

    Returns:
        `tasks`, by name: the `score` in percent and its `metric`, further `metrics`, the `count`, and the `paper`'s
        score; their `average`; the `model`, `method`, `parameters` and `percent` of them; `paper`, its whole row.

    Raises:
        ReftError: an adapter, a model or data that cannot do this; told before anything is answered.
    """
    check_suite(suite)
    if suite == "instruct" and output is None:
        raise ReftError("the answers of instruct are for a judge to read; name a directory for them.", setting="output")
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
    told = progress or (lambda done, total: None)
    asked = _Asked(Path(adapter), data_dir, tasks, model, dtype, batch_size, limit, told)
    if suite == GLUE:
        place, adapted, results = _classify(asked)
    else:
        place, adapted, results = _generate(asked, GENERATED[suite], decoding, seed)
    base, method, size = model or base_of(place), title(place), count_saved(place)
    return {
        "suite": suite,
        "adapter": str(adapter),
        "model": base,
        "method": method,
        "parameters": size,
        "percent": 100 * size / _base_parameters(adapted),
        "limit": limit,
        **_row(suite, results, base, method, output),
    }


def columns(suite: str) -> dict[str, str]:
    """The tasks of a suite in the order of its table, with the titles of their columns."""
    return {task.name: task.title for task in TASKS.values()} if suite == GLUE else GENERATED[suite].tasks


def _row(suite: str, results: Results, base: str, method: str | None, output: str | Path | None) -> dict[str, Any]:
    """The scores with the paper's beside them; the answers go to the files."""
    paper = paper_row(suite, base, method)
    for task, result in results.items():
        found = result.pop("answers")
        if output is not None:
            text = json.dumps(found, ensure_ascii=False, indent=1)
            (Path(output) / f"{task}.json").write_text(text + "\n", encoding="utf-8")
        result["paper"] = paper.scores[task] if paper else None
    scores = [result["score"] for result in results.values()]
    whole = results.keys() == columns(suite).keys() and None not in scores
    return {
        "tasks": results,
        "average": sum(scores) / len(scores) if whole else None,
        "paper": asdict(paper) if paper else None,
    }


def _base_parameters(model: Any) -> int:
    """How many parameters the base model has, without the adapter and the copies of what is trained beside it."""
    ours = (PREFIX, "lora_", "modules_to_save")
    names = model.get_base_model().named_parameters()
    return sum(parameter.numel() for name, parameter in names if not any(part in name for part in ours))


# -- generation --------------------------------------------------------------------------------------------------------


def _generate(asked: _Asked, suite: Suite, decoding: dict[str, Any] | None, seed: int) -> tuple[Path, Any, Results]:
    """The results of the tasks of a suite whose answers are generated, with the adapter's directory and the model."""
    place = asked.adapter
    check_generates(place)
    check_rules(place)
    check_adapter(place, asked.model)
    check_language_model(asked.model or base_of(place))
    questions = {task: suite.questions(task, asked.data_dir, asked.limit) for task in asked.tasks or suite.tasks}
    adapted, tokenizer = asked.load(place)
    decoding = read_decoding(place, suite.name) if decoding is None else decoding
    _check_room(adapted, tokenizer, questions, decoding)
    set_seed(seed)
    total, done = sum(map(len, questions.values())), 0
    asked.progress(done, total)
    results = {}
    for task, of_task in questions.items():
        prompts, texts = [question.prompt for question in of_task], []
        for text in generate_answers(adapted, tokenizer, prompts, batch_size=asked.batch_size, decoding=decoding):
            texts.append(text)
            done += 1
            asked.progress(done, total)
        results[task] = _judge(suite, of_task, texts, place.name)
    return place, adapted, results


def _check_room(model: Any, tokenizer: Any, questions: dict[str, list[Question]], decoding: dict[str, Any]) -> None:
    context = context_length(model.get_base_model(), tokenizer)
    limit = min(context, decoding.get("max_length", context))
    for question in (q for asked in questions.values() for q in asked):
        if (length := len(token_ids(tokenizer, question.prompt))) >= limit:
            raise ReftError(f"{question.where}: the prompt has {length} tokens; {limit} leave no room for an answer.")


def _judge(suite: Suite, questions: list[Question], texts: list[str], name: str) -> dict[str, Any]:
    """Score the texts; where a judge does, write them in the form of AlpacaEval."""
    pairs = list(zip(questions, texts, strict=True))
    rows: list[dict[str, Any]]
    if suite.extract is None:
        rows = [
            {"instruction": q.instruction, "output": text.strip(), "generator": name, "dataset": q.source}
            for q, text in pairs
        ]
        return {"metric": "judge", "score": None, "metrics": {}, "count": len(rows), "answers": rows}
    found = [suite.extract(text, question.answer) for question, text in pairs]
    rows = [
        {"instruction": q.instruction, "output": text, "found": f, "answer": q.answer, "right": same(f, q.answer)}
        for (q, text), f in zip(pairs, found, strict=True)
    ]
    share = 100 * sum(bool(row["right"]) for row in rows) / len(rows)
    return {
        "metric": "accuracy",
        "score": share,
        "metrics": {"accuracy": share},
        "count": len(rows),
        "answers": rows,
    }


# -- GLUE --------------------------------------------------------------------------------------------------------------


def _glue_adapters(place: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The adapter of each task: the one of the directory, or those that it holds."""
    wanted = [find_task(name).name for name in tasks]
    if is_adapter(place):
        own = read_record(place).get("task")
        if len(wanted) > 1 or (own and wanted not in ([], [own])):
            raise ReftError(f"{place} is an adapter for {own or 'one task'}, got {', '.join(wanted)}.", setting="task")
        if not own and not wanted:
            raise ReftError(f"{place}: the adapter has no recipe.json that says for which task of GLUE it is; name it.")
        return {own or wanted[0]: place}
    found = {task: place / task for task in TASKS if is_adapter(place / task)}
    if not found:
        raise ReftError(
            f"{place}: expected an adapter's directory, or one with an adapter for each task, as {place / 'rte'}."
        )
    for task in wanted:
        if task not in found:
            raise ReftError(f"{place} holds adapters for {', '.join(found)}, none for {task}.", setting="task")
    return {task: found[task] for task in wanted or found}


def _scored(task: str, place: Path, data_dir: str | Path | None) -> list[Pair]:
    """The part of the validation set that the adapter's training did not look at."""
    _, scored = split_validation(read(TASKS[task], "validation", data_dir), read_record(place).get("seed", 42))
    return scored


def _classify(asked: _Asked) -> tuple[Path, Any, Results]:
    """The results of each task's adapter, with the last of the adapters' directories and its model."""
    places = _glue_adapters(asked.adapter, asked.tasks)
    for place in places.values():
        check_adapter(place, asked.model)
    halves = {task: _scored(task, place, asked.data_dir)[: asked.limit] for task, place in places.items()}
    total, done = sum(map(len, halves.values())), 0
    results: Results = {}
    for task, place in places.items():
        adapted, tokenizer = asked.load(place, TASKS[task].outputs)
        asked.progress(done, total)
        most = read_record(place).get("max_length") or GLUE_LENGTH
        results[task] = classify(adapted, tokenizer, TASKS[task], halves[task], most=most, batch_size=asked.batch_size)
        done += len(halves[task])
        asked.progress(done, total)
    return place, adapted, results
