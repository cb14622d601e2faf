"""`pyreft generate`: answers of an adapted model."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from pyreft_cli import options
from pyreft_cli.console import console, hush, print_json, progress_bar

Prompt = tuple[str, str]  # and its further input


def generate(
    adapter: options.AdapterOption,
    prompt: Annotated[list[str] | None, Option(help="A prompt; may be given several times.")] = None,
    file: Annotated[
        Path | None, Option(help="Prompts: lines of a .txt, or the field prompt of .jsonl, .json, .csv.")
    ] = None,
    output: Annotated[Path | None, Option(help="Write prompts and answers to this file, as JSON Lines.")] = None,
    base: Annotated[bool, Option("--base", help="Show the base model's answer, too.")] = False,
    model: options.AdapterModel = None,
    batch_size: Annotated[int, Option(help="Prompts answered at once.", min=1)] = 16,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.DrawingSeed = 42,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Answer prompts with an adapter."""
    hush()
    from transformers import set_seed

    from pyreft.data.files import read_prompts

    if output:
        _check_output(output, file)
    asked = [(text, "") for text in prompt or []] + (read_prompts(file) if file else [])
    if not asked:
        raise BadParameter("give a --prompt or a --file of them.")
    adapted, tokenizer, form = load(adapter, model)
    texts = _written(adapted, tokenizer, form, asked)
    shown = not (quiet or as_json) and len(texts) > batch_size
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "temperature": temperature}
    set_seed(seed)
    answers = _answers("Answering", shown, adapted, tokenizer, texts, how)
    results = [{"prompt": text, "answer": answer} for (text, _), answer in zip(asked, answers, strict=True)]
    if base:
        set_seed(seed)
        with adapted.disable_adapter():
            answers = _answers("Base model", shown, adapted, tokenizer, texts, how)
        results = [result | {"base": answer} for result, answer in zip(results, answers, strict=True)]
    if output:
        output.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results), encoding="utf-8")
    if as_json:
        print_json(results)
    elif not output:
        _tell(results)


def _check_output(output: Path, file: Path | None) -> None:
    """Refuse what cannot be written in the end, before anything is answered, and the file of the prompts."""
    problem = None
    if not output.absolute().parent.is_dir():
        problem = f"{output.parent} is not a directory."
    elif output.is_dir():
        problem = f"expected a file, {output} is a directory."
    elif file and file.exists() and output.exists() and output.samefile(file):
        problem = f"{output} has the prompts, which would be lost; name another file."
    else:
        try:
            if output.is_file():
                output.open("a").close()
            elif not output.exists():
                tempfile.TemporaryFile(dir=output.absolute().parent).close()
        except OSError as error:
            problem = f"{output} cannot be written ({os.strerror(error.errno or 0)})."
    if problem:
        raise BadParameter(problem, param_hint="--output")


def load(adapter: str, model: str | None) -> tuple[Any, Any, Any]:
    """The adapted model, its tokenizer, and how prompts are written."""
    from pyreft.data.encode import default_format
    from pyreft.files.record import read_format
    from pyreft.loading import check_rules, load_adapted

    check_rules(adapter)
    written = read_format(adapter)
    adapted, tokenizer = load_adapted(adapter, model)
    return adapted, tokenizer, written or default_format(tokenizer)


def _written(adapted: Any, tokenizer: Any, form: Any, asked: Sequence[Prompt]) -> list[str]:
    """The prompts as the model reads them; one that fills its context is refused."""
    from pyreft.data.encode import context_length, prompt_text, token_ids
    from pyreft.errors import ReftError

    texts = [prompt_text(tokenizer, text, form, given) for text, given in asked]
    limit = context_length(adapted.get_base_model(), tokenizer)
    for number, text in enumerate(texts, 1):
        if (count := len(token_ids(tokenizer, text))) >= limit:
            raise ReftError(f"Prompt {number} has {count} tokens, the model's context {limit}; shorten it.")
        if not count:
            raise ReftError(f"Prompt {number} is empty, and the tokenizer begins no text by itself; write something.")
    return texts


def _answers(title: str, shown: bool, model: Any, tokenizer: Any, texts: list[str], how: dict[str, Any]) -> list[str]:
    from pyreft.generation import generate_answers

    answers = []
    with progress_bar(title, shown=shown, unit="prompts") as move:
        move(0, len(texts))
        for answer in generate_answers(model, tokenizer, texts, **how):
            answers.append(answer)
            move(len(answers), len(texts))
    return answers


def _tell(results: list[dict[str, str]]) -> None:
    for result in results:
        if len(results) > 1:
            console.print(f"> {result['prompt']}", markup=False)
        if "base" in result:
            console.print(f"base:    {result['base']}", markup=False)
            console.print(f"adapted: {result['answer']}", markup=False)
        else:
            console.print(result["answer"], markup=False)
