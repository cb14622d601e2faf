"""`pyreft eval`: an adapter on held-out examples, on a suite beside the paper's own figures, or on lm-eval's tasks."""

from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Context, Option

from pyreft_cli import harness, held_out, options
from pyreft_cli.console import console, counted, hush, print_json, progress_bar


def evaluate(
    context: Context,
    adapter: options.Evaluated,
    data: Annotated[
        str | None, Option(help="Examples that it was not trained on, as `pyreft train` reads them.")
    ] = None,
    prompt_field: options.PromptField = None,
    completion_field: options.CompletionField = None,
    turns: Annotated[
        str | None,
        Option(help="Of a chat, ask for 'each' answer behind what comes before it, or the 'last'.  [default: each]"),
    ] = None,
    encoding: options.Encoding = None,
    on_error: options.OnError = None,
    long_rows: options.LongRows = None,
    suite: Annotated[str | None, Option(help="Or commonsense, arithmetic, instruct or glue.")] = None,
    tasks: Annotated[str | None, Option(help="Or tasks of lm-eval, as arc_easy,piqa; needs pyreft[eval].")] = None,
    include_path: Annotated[Path | None, Option(help="A directory with lm-eval tasks of your own, as YAML.")] = None,
    data_dir: Annotated[str | None, Option(help="The directory of the suite's data.  [default: the hub]")] = None,
    task: Annotated[
        list[str] | None, Option(help="One of the tasks; may be given several times.  [default: all]")
    ] = None,
    model: options.AdapterModel = None,
    dtype: Annotated[str | None, Option(help="Of the base model.  [default: as in training]")] = None,
    batch_size: Annotated[int, Option(help="Questions answered at once.", min=1)] = 16,
    limit: Annotated[int | None, Option(help="Only the first so many questions of each task.", min=1)] = None,
    greedy: Annotated[
        bool, Option("--greedy", help="Take the likeliest token each time, whatever the recipe.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, Option(help="The most tokens of an answer.  [default: the recipe's]", min=1)
    ] = None,
    seed: options.DrawingSeed = 42,
    output: Annotated[
        Path | None, Option(help="A directory for the answers; those of instruct as AlpacaEval takes them.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Score an adapter on a file of examples, on a suite of the paper beside its row there, or on tasks of lm-eval."""
    asked = [name for name, value in (("data", data), ("suite", suite), ("tasks", tasks)) if value is not None]
    if len(asked) != 1:
        raise BadParameter("expected one of the three.", param_hint="--data / --suite / --tasks")
    _check_options(context, asked[0])
    common: dict[str, Any] = {"model": model, "dtype": dtype, "batch_size": batch_size, "limit": limit}
    if data is not None:
        given = {name: context.params[name] for name in _READING if context.params[name] is not None}
        common |= {"long_rows": long_rows}
        held_out.score(adapter, data, given, max_new_tokens=max_new_tokens, quiet=quiet, as_json=as_json, **common)
    elif tasks is not None:
        names = [name.strip() for name in tasks.split(",")]
        harness.print_tasks(adapter, names, include_path=include_path, quiet=quiet, as_json=as_json, **common)
    elif suite is not None:
        hush()
        decoding = _decoding(adapter, suite, greedy=greedy, max_new_tokens=max_new_tokens)
        common |= {"tasks": task or (), "decoding": decoding, "seed": seed, "output": output}
        result = _score(adapter, suite, data_dir, shown=not (quiet or as_json), **common)
        _tell(result, as_json=as_json, output=output)


_READING = ("prompt_field", "completion_field", "turns", "encoding", "on_error")
_ALONE: dict[str, tuple[str, ...]] = {
    "suite": ("data_dir", "task", "greedy", "max_new_tokens", "seed", "output"),
    "tasks": ("include_path",),
    "data": ("max_new_tokens", "long_rows", *_READING),
}


def _check_options(context: Context, chosen: str) -> None:
    """Refuse options that only another kind of evaluation has."""
    for name in {name for names in _ALONE.values() for name in names} - {*_ALONE[chosen]}:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise BadParameter(
                f"--{chosen} has no such option; leave it out.", param_hint=f"--{name.replace('_', '-')}"
            )


def _decoding(adapter: str, suite: str, *, greedy: bool, max_new_tokens: int | None) -> dict[str, Any] | None:
    """The recipe's way of generating with what the command changes; none where nothing is changed or generated."""
    from pyreft.jobs.recipes import read_decoding
    from pyreft.tasks.suites import GLUE, check_suite

    if check_suite(suite) == GLUE or not (greedy or max_new_tokens):
        return None
    decoding = read_decoding(adapter, suite)
    if greedy:
        for name in ("temperature", "top_p", "top_k", "num_beams"):
            decoding.pop(name, None)
    if max_new_tokens:
        decoding.pop("max_length", None)
        decoding["max_new_tokens"] = max_new_tokens
    return decoding


def _score(adapter: str, suite: str, data_dir: str | None, *, shown: bool, **settings: Any) -> dict[str, Any]:
    from pyreft.jobs.evaluate import evaluate as score

    with progress_bar("Answering", shown=shown, unit="questions") as move:
        return score(adapter, suite, data_dir, progress=move, **settings)


def _tell(result: dict[str, Any], *, as_json: bool, output: Path | None) -> None:
    if as_json:
        print_json(result)
        return
    _show(result)
    if output:
        console.print(f"The answers are in {output}.", markup=False)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from pyreft.jobs.evaluate import columns

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    paper = result["paper"] or {"scores": {}, "average": None, "params": None}
    table = Table("", "metric")
    table.add_column("this adapter", justify="right")
    table.add_column(f"paper: {paper['model']}, {paper['method']}" if result["paper"] else "paper", justify="right")
    for task, title in columns(result["suite"]).items():
        own = result["tasks"].get(task, {})
        table.add_row(title, own.get("metric", ""), cell(own.get("score")), cell(paper["scores"].get(task)))
    table.add_section()
    table.add_row("average", "", cell(result["average"]), cell(paper["average"]))
    share = f"{paper['params']:g}" if result["paper"] else ""
    table.add_row("parameters, %", "", f"{result['percent']:.4g}", share)
    console.print(table)
    if result["limit"]:
        console.print(f"Asked: only the first {counted(result['limit'], 'question')} of each task.")
