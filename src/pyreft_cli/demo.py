"""`pyreft demo`: the main job, on the embedded model in a minute and without a network, or on another one."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pyreft_cli import options
from pyreft_cli.console import console, hush, print_json, progress_bar

SHOWN = 6  # unseen questions to show
OUTPUT = Path("pyreft-demo")  # the demo's own: a second run replaces what the first left


def demo(
    output: Annotated[Path, typer.Option(help="The directory for the adapter.")] = OUTPUT,
    model: options.Model = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in another output.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Teach a model, by default the embedded one, to answer in emojis, from ten examples, and show what changed."""
    shown = not (quiet or as_json)
    begin = time.perf_counter()
    if shown:
        what = model or "a language model of 3.5 million parameters that ships with pyreft"
        console.print(f"Loading {what} ...", markup=False)
    hush()
    from pyreft.jobs.demo import EmojiDemo

    run = EmojiDemo(output, model, overwrite=overwrite or output == OUTPUT)
    before = run.ask()
    with progress_bar("Training on 10 examples", shown=shown) as move:
        move(0, None)
        run.train(move)
    result = run.measure(before)
    result["total_seconds"] = time.perf_counter() - begin
    if as_json:
        print_json(result)
    elif shown:
        _tell(result)


def _tell(result: dict[str, Any]) -> None:
    table = Table(title="Questions that neither the model nor the adapter was trained on", title_justify="left")
    for column in ("question", "before", "after"):
        table.add_column(column, overflow="fold")
    for answer in result["answers"][:: len(result["answers"]) // SHOWN][:SHOWN]:
        table.add_row(answer["question"], answer["before"], answer["after"])
    console.print(table)
    size, total = result["parameters"], result["model_parameters"]
    same = "identical" if result["reload_identical"] else "DIFFERENT"
    console.print(
        f"Trained      {size:,} of {total:,} parameters ({100 * size / total:.2f} %) in {result['seconds']:.1f} s\n"
        f"In emojis    {result['before_in_emojis']} of {result['questions']} unseen questions before, "
        f"{result['in_emojis']} after ({result['right']} the right ones)\n"
        f"Saved        {result['output']} ({result['bytes'] / 1000:.1f} kB); a fresh model's answers are {same}\n"
    )
    console.print("Next:", style="bold")
    for command in (
        f'pyreft generate --adapter {result["output"]} --prompt "What is a whale?" --base',
        f"pyreft chat --adapter {result['output']}",
        f'pyreft info {result["output"]} --text "What is a whale?"',
        "pyreft train --help",
    ):
        console.print(f"  {command}", markup=False)
