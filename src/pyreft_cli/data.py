"""`pyreft data`: what a training would see of a file."""

from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Argument, Context, Option

from pyreft.data.tally import listed_fields
from pyreft_cli import options
from pyreft_cli.console import console, counted, hush, print_json
from pyreft_cli.early import check_data
from pyreft_cli.settings import read_settings

_BAR = 40  # characters


def data(
    context: Context,
    data: Annotated[str, Argument(help="Examples, as `pyreft train --data` reads them.")],
    model: options.Model = None,
    positions: options.Positions = None,
    format: options.Format = None,
    turns: options.Turns = None,
    prompt_field: options.PromptField = None,
    completion_field: options.CompletionField = None,
    encoding: options.Encoding = None,
    limit: options.Limit = None,
    max_length: options.MaxLength = None,
    long_rows: options.LongRows = None,
    config: Annotated[
        Path | None, Option(help="A YAML file as `pyreft train` takes it; options given here win.")
    ] = None,
    rows: Annotated[int, Option(help="How many rows to show by their tokens.", min=0)] = 3,
    as_json: options.Json = False,
) -> None:
    """Show what a training would see of a file: prompts, what is learned, which tokens are edited, and lengths.

    Wrong rows are counted and named. Neither is the model loaded, nor anything written.
    """
    settings = read_settings(context.params, config)
    settings.pop("output", None)
    check_data(settings | {"on_error": "skip"})
    hush()
    from pyreft.jobs.preview import preview
    from pyreft.jobs.settings import TrainingJob

    found = preview(TrainingJob.from_settings(settings, str(config or "data"), needed=("data",)), rows)
    if as_json:
        print_json(found.to_dict())
    else:
        _tell(found)


def _tell(found: Any) -> None:
    for where, tokens in found.shown:
        console.print(where, style="bold", markup=False)
        console.print(_marked(tokens), end="\n\n")
    if found.shown:
        console.print(Text.assemble("Colours: the prompt, ", ("what is learned", "green"), ", ",
                                    ("the tokens that are edited", "reverse"), "."))  # fmt: skip
    console.print(
        f"{counted(found.rows, 'row')}, {counted(found.examples, 'answer')} to learn from, written as {found.format}."
    )
    for low, high, count in found.histogram():
        bar = "#" * max(round(_BAR * count / found.examples), count > 0)
        console.print(f"{low:>7,} to {high:>6,} tokens {count:>7,} {bar}", markup=False)
    if found.long:
        console.print(
            f"Longer than the {found.context:,} tokens that fit: {counted(found.long, 'row')} "
            f"(--long-rows {found.long_rows}; others are refuse, cut, skip)."
        )
    if found.unread:
        console.print(f"Not read: {listed_fields(found.unread)}.", markup=False)
    if found.errors:
        console.print(f"Wrong: {counted(found.errors, 'row')} (--on-error stop, or skip to leave them out):")
        console.print(found.wrong, markup=False)


def _marked(tokens: Any) -> Text:
    text = Text()
    for token in tokens:
        style = " ".join(name for name, on in (("green", token.learned), ("reverse", token.edited)) if on)
        text.append(token.text, style=style or None)
    return text
