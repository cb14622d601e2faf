"""A suite's row for an adapter: its test sets are answered, the answers scored, and the paper's row put beside it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..data.encode import context_length, token_ids
from ..errors import ReftError
from ..files.adapter import is_adapter
from ..files.record import read_record
from ..generation import generate_answers
from ..loading import base_of, check_adapter, check_generates, check_language_model, load_adapted
from ..tasks.answers import same
from ..tasks.figures import paper_row
from ..tasks.glue import TASKS, Pair, Task, find_task, read, split_validation
from ..tasks.suites import GENERATED, GLUE, Question, Suite, check_suite
from .adapters import count_saved, title
from .classify import answers, encode_pairs, score
from .recipes import read_decoding

Progress = Callable[[int, int], None]
GLUE_LENGTH = 256  # the paper's, for an adapter without a record


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
    if suite == GLUE:
        place, adapted, results = _run_glue(Path(adapter), data_dir, tasks, model, dtype, batch_size, limit, progress)
    else:
        chosen, place = GENERATED[suite], Path(adapter)
        check_generates(place)
        check_adapter(place, model)
        check_language_model(model or base_of(place))
        questions = {task: chosen.questions(task, data_dir, limit) for task in tasks or chosen.tasks}
        adapted, tokenizer = load_adapted(place, model, dtype or read_record(place).get("dtype", "auto"))
        wanted = read_decoding(place, suite) if decoding is None else decoding
        _check_room(adapted, tokenizer, questions, wanted)
        set_seed(seed)
        texts = _texts(adapted, tokenizer, questions, wanted, batch_size, progress)
        results = {task: _judge(chosen, questions[task], texts[task], place.name) for task in questions}
    base, method = model or base_of(place), title(place)
    size = count_saved(place)
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


def _row(
    suite: str, results: dict[str, dict[str, Any]], base: str, method: str | None, output: str | Path | None
) -> dict[str, Any]:
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


# -- generation --------------------------------------------------------------------------------------------------------


def _check_room(model: Any, tokenizer: Any, questions: dict[str, list[Question]], decoding: dict[str, Any]) -> None:
    context = context_length(model.get_base_model(), tokenizer)
    limit = min(context, decoding.get("max_length", context))
    for question in (q for asked in questions.values() for q in asked):
        if (length := len(token_ids(tokenizer, question.prompt))) >= limit:
            raise ReftError(f"{question.where}: the prompt has {length} tokens; {limit} leave no room for an answer.")


def _texts(
    model: Any,
    tokenizer: Any,
    questions: dict[str, list[Question]],
    decoding: dict[str, Any],
    batch_size: int,
    progress: Progress | None,
) -> dict[str, list[str]]:
    """The generated answers of each task."""
    total, done = sum(map(len, questions.values())), 0
    texts: dict[str, list[str]] = {}
    if progress is not None:
        progress(done, total)
    for task, asked in questions.items():
        prompts = [question.prompt for question in asked]
        texts[task] = []
        for text in generate_answers(model, tokenizer, prompts, batch_size=batch_size, decoding=decoding):
            texts[task].append(text)
            done += 1
            if progress is not None:
                progress(done, total)
    return texts


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


def _run_glue(
    adapter: Path,
    data_dir: str | Path | None,
    tasks: Sequence[str],
    model: str | None,
    dtype: str | None,
    batch_size: int,
    limit: int | None,
    progress: Progress | None,
) -> tuple[Path, Any, dict[str, dict[str, Any]]]:
    """The results of each task's adapter, with the last of the adapters and its directory."""
    places = _glue_adapters(adapter, tasks)
    for place in places.values():
        check_adapter(place, model)
    halves = {task: _scored(task, place, data_dir)[:limit] for task, place in places.items()}
    total, done = sum(map(len, halves.values())), 0
    results: dict[str, dict[str, Any]] = {}
    for task, place in places.items():
        adapted, tokenizer = load_adapted(place, model, dtype or "auto", TASKS[task].outputs)
        if progress is not None:
            progress(done, total)
        results[task] = _classify(adapted, tokenizer, TASKS[task], halves[task], place, batch_size)
        done += len(halves[task])
        if progress is not None:
            progress(done, total)
    return place, adapted, results


def _classify(
    model: Any, tokenizer: Any, task: Task, pairs: list[Pair], place: Path, batch_size: int
) -> dict[str, Any]:
    limit = min(read_record(place).get("max_length") or GLUE_LENGTH, context_length(model.get_base_model(), tokenizer))
    rows = encode_pairs(tokenizer, task, pairs, limit)
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        part = [{k: v for k, v in row.items() if k != "labels"} for row in rows[start : start + batch_size]]
        batch = tokenizer.pad(part, padding_side="right", return_tensors="pt").to(model.device)
        with torch.no_grad():
            found += answers(task, model(**batch).logits.float())
    truth = [pair.label for pair in pairs]
    metrics = {name: 100 * value for name, value in score(task, found, truth).items()}
    kept = [
        {"sentences": pair.sentences, "found": value, "label": pair.label}
        for pair, value in zip(pairs, found, strict=True)
    ]
    return {
        "metric": task.metrics[0],
        "score": metrics[task.metrics[0]],
        "metrics": metrics,
        "count": len(pairs),
        "answers": kept,
    }


def _base_parameters(model: Any) -> int:
    """How many parameters the base model has, without the adapter and the copies of what is trained beside it."""
    ours = ("reft_", "lora_", "modules_to_save")
    names = model.get_base_model().named_parameters()
    return sum(parameter.numel() for name, parameter in names if not any(part in name for part in ours))
