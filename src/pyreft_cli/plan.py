"""`pyreft plan`: what a training will cost, by position rule; and the line of `pyreft train` that says it in short."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.table import Table
from typer import Context, Option

from pyreft_cli import options
from pyreft_cli.console import console, counted, hush, print_json
from pyreft_cli.early import check_data
from pyreft_cli.settings import read_settings

_SAMPLE = 512  # rows that the line of `pyreft train` looks at
_CHEAPER = ("l16", "l8", "l4", "l1")  # rules to name where most of the work can be saved, the roomiest first


def plan(
    context: Context,
    data: Annotated[str | None, Option(help="Examples, as `pyreft train` reads them.")] = None,
    model: options.Model = None,
    layers: options.Layers = None,
    positions: Annotated[str | None, Option(help="A rule to show beside the usual ones.  [default: l16]")] = None,
    rank: Annotated[int | None, Option(help="Rank of the edits, as of `pyreft train`.")] = None,
    component: options.Component = None,
    intervention: Annotated[str | None, Option(help="The formula, as of `pyreft train`.")] = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.GradientAccumulation = None,
    max_length: options.MaxLength = None,
    long_rows: options.LongRows = None,
    turns: options.Turns = None,
    prompt_field: options.PromptField = None,
    completion_field: options.CompletionField = None,
    encoding: options.Encoding = None,
    on_error: options.OnError = None,
    format: Annotated[str | None, Option(help="How prompts are written: text, chat or alpaca.")] = None,
    dtype: options.Dtype = None,
    reach_memory: Annotated[
        str | None, Option(help="How much may be held, as 4GB.  [default: half of the free memory]")
    ] = None,
    config: Annotated[
        Path | None, Option(help="A YAML file as `pyreft train` takes it; options given here win.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a training will cost under several position rules, before it is started.

    Tokens and memory are counted; the time is measured in a few steps on one batch. Nothing is trained or written.
    """
    settings = read_settings(context.params, config)
    settings.pop("output", None)
    check_data(settings)
    hush()
    from pyreft.jobs.job import PreparedJob
    from pyreft.jobs.plan import make_plan
    from pyreft.jobs.settings import TrainingJob

    job = TrainingJob.from_settings(settings, str(config or "plan"), needed=("data",))
    status: Any = nullcontext() if as_json else console.status("Counting tokens and measuring a few steps ...")
    with status:
        made = make_plan(PreparedJob(job))
    if as_json:
        print_json(made.to_dict())
    else:
        _tell(made, job)


def cost_line(prepared: Any) -> str:
    """What the steps of a prepared job compute, beside those of `l1`, and a cheaper rule where there is one."""
    from pyreft.jobs.plan import make_plan
    from pyreft.positions import Positions

    own = prepared.job.positions
    made = make_plan(prepared, _CHEAPER, most=_SAMPLE, timed=False)
    if made.computes != "windows":
        return _why_whole(made)
    share = made.cost_of(own).share
    cheaper = next((rule for rule in _CHEAPER if made.cost_of(rule).share <= share / 2), None)
    if share <= 0.5 or cheaper is None:
        line = f"Each step computes {_percent(share)} of the tokens in {_layers(made)}"
        return f"{line}, as with l1." if made.cost_of("l1").share == share else f"{line} ({_beside(made)})."
    rule = Positions.parse(own)
    whole = f"{own} begins at the first token, so each step computes whole rows"
    some = f"With {own}, each step computes {_percent(share)} of the tokens"
    other = "" if cheaper == "l1" else f", {_beside(made)}"
    return (
        f"{whole if rule.first or rule.whole else some} in {_layers(made)}; {cheaper} would compute "
        f"{_percent(made.cost_of(cheaper).share)} of the tokens{other} (see pyreft plan)."
    )


def _beside(made: Any) -> str:
    return f"l1 {_percent(made.cost_of('l1').share)}"


def _layers(made: Any) -> str:
    return f"{made.layers - made.skipped} of {made.layers} layers"


def _why_whole(made: Any) -> str:
    """Why the rule makes no difference."""
    if made.computes == "rows":
        return f"Whole rows are computed in each step, whatever the rule: {made.why_not}."
    return (
        f"Rows of this model cannot be computed in part, so each step computes whole ones, whatever the rule, in "
        f"{_layers(made)}; the {made.skipped} below the first edit are computed once."
    )


def _tell(made: Any, job: Any) -> None:
    own = made.cost_of(job.positions)
    epochs = "1 epoch" if made.epochs == 1 else f"each of {made.epochs:g} epochs"
    layers = "all layers" if job.layers == "all" else f"layer{'' if job.layers.isdigit() else 's'} {job.layers}"
    console.print(
        f"{counted(made.rows, 'row')}, {counted(own.tokens, 'token')} with padding, {counted(made.steps, 'step')} in "
        f"{epochs}; edits in {layers}.",
        markup=False,
    )
    again = any(cost.frozen_later for cost in made.costs)
    headings = ("rule", "edited", "computed", "once", "again", "held", "peak", "step", "training", "x l1")
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        if again or heading != "again":
            table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for cost in made.costs:
        table.add_row(*_row(cost, made, again), style="bold" if cost is own else None)
    console.print(table)
    again_too = "; again in each later one" if again else ""
    explained = f"""\
edited    tokens of a row, on average
computed  of the tokens, in each step, in {_layers(made)}, with gradients
once      of tokens times layers, in the first epoch, without gradients{again_too}
held      in memory of what was computed once; up to {_size(made.budget_bytes)}
peak      model, what is held, and a step over the largest batch, about
step      and training: from steps over {made.timed} on this machine, without validation and saving"""
    console.print(explained, markup=False)
    if made.computes != "windows":
        console.print(_why_whole(made), markup=False)
    if any(cost.full for cost in made.costs):
        console.print(
            "What does not fit in memory is computed again in each epoch; --reach-memory and a --reach-directory of "
            "pyreft train give it more room."
        )


def _row(cost: Any, made: Any, again: bool) -> list[str]:
    if not cost.edited:
        return [cost.positions, "no token"]
    everything = cost.tokens * made.layers
    return [
        cost.positions,
        f"{cost.edited:.1f}",
        _percent(cost.share),
        _percent(cost.frozen_first / everything),
        *([_percent(cost.frozen_later / everything)] if again else []),
        _size(cost.held_bytes),
        _size(cost.peak_bytes),
        _time(cost.seconds_per_step),
        _time(cost.seconds),
        f"{cost.against:.1f}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _size(count: float) -> str:
    unit = next((unit for unit in ("B", "kB", "MB", "GB") if count < 999.5 * 1000 ** "BkMG".index(unit[0])), "TB")
    number = count / 1000 ** "BkMGT".index(unit[0])
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
