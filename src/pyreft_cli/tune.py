"""`pyreft tune`: settings found for a data file, and the best adapter trained."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.live import Live
from rich.table import Table
from typer import Option

from pyreft_cli import options
from pyreft_cli.console import console, counted, hush, print_json
from pyreft_cli.early import check_data
from pyreft_cli.settings import read_settings

_SHOWN = 12  # trainings in the table: the best ones, and the one under way
# what is not a setting of each training
_OWN = (
    *("data", "output", "model", "seed", "validation", "validation_split"),
    *("minutes", "trials", "parameters", "score", "jobs", "resume"),
)
_OVER = ("done", "pruned", "diverged")

Output = Annotated[str | None, Option(help="A new directory for the study and the best adapter.")]
Minutes = Annotated[float | None, Option(help="For how long; the first training ends in any case.  [default: 10]")]
Trials = Annotated[int | None, Option(help="How many trainings.  [default: as the time allows]")]
Parameters = Annotated[str | None, Option(help="How many an adapter may have, as 20k.  [default: any number]")]
Score = Annotated[
    str | None, Option(help="What counts on the held-out examples: 'loss', or answers 'exact'.  [default: loss]")
]
Split = Annotated[float | None, Option(help="Or the share of the data to hold out for it.  [default: 0.2]")]
Jobs = Annotated[int | None, Option(help="Processes that train at once.  [default: 1]")]
Resume = Annotated[bool | None, Option("--resume", help="Go on with the study in the output.")]


def tune(
    context: typer.Context,
    data: options.Data = None,
    output: Output = None,
    model: options.Model = None,
    minutes: Minutes = None,
    trials: Trials = None,
    parameters: Parameters = None,
    score: Score = None,
    validation: options.Validation = None,
    validation_split: Split = None,
    jobs: Jobs = None,
    resume: Resume = None,
    seed: options.Seed = None,
    intervention: options.Intervention = None,
    component: options.Component = None,
    layers: options.Layers = None,
    positions: options.Positions = None,
    rank: options.Rank = None,
    lr: options.LearningRate = None,
    epochs: options.Epochs = None,
    dropout: options.Dropout = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.GradientAccumulation = None,
    warmup_ratio: options.WarmupRatio = None,
    lr_scheduler_type: options.LrSchedulerType = None,
    adam_beta1: options.AdamBeta1 = None,
    weight_decay: options.WeightDecay = None,
    limit: options.Limit = None,
    max_length: options.MaxLength = None,
    long_rows: options.LongRows = None,
    turns: options.Turns = None,
    prompt_field: options.PromptField = None,
    completion_field: options.CompletionField = None,
    encoding: options.Encoding = None,
    on_error: options.OnError = None,
    format: options.Format = None,
    dtype: options.Dtype = None,
    reach: options.Reach = None,
    reach_memory: options.ReachMemory = None,
    config: options.Config = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Find layers, tokens, formula, rank, dropout, rate and epochs for a file of examples, and train the best adapter.

    Trainings are scored on held-out examples, that of the default settings first. An option of `pyreft train` that is
    given here stays as it is. Stopped, it goes on with --resume. Needs Optuna: pip install "pyreft[tune]".
    """
    settings = read_settings(context.params, config)
    for name in ("data", "output"):
        if not settings.get(name):
            raise typer.BadParameter("it is missing.", param_hint=f"--{name}")
    check_data(settings)
    hush()
    found = _search(settings, shown := not (quiet or as_json))
    if as_json:
        print_json({"output": str(found.output), **found.to_dict()})
    elif shown:
        _tell(found)


def _search(settings: dict[str, Any], shown: bool) -> Any:
    """Tune; where it is interrupted, say how to go on."""
    from pyreft.tuning import tune as search

    own, found = {name: settings.pop(name) for name in _OWN if name in settings}, None
    with _table(own.get("score", "loss"), shown) as progress, suppress(KeyboardInterrupt):
        found = search(**own, settings=settings, progress=progress)
    if found is None:
        begun = (Path(own["output"]) / "study.db").exists()
        kept = f"What is done is in {own['output']}; go on with --resume." if begun else "Nothing was begun yet."
        typer.echo(f"pyreft: interrupted. {kept}", err=True)
        raise typer.Exit(130)
    return found


@contextmanager
def _table(score: str, shown: bool) -> Iterator[Callable[[Sequence[Any], float | None], None]]:
    """Yield what shows the trainings so far: as a table in a terminal, else as a line for each that is over."""
    if not shown:
        yield lambda records, left: None
        return
    if not console.is_terminal:
        told: set[int] = set()

        def lines(records: Sequence[Any], left: float | None) -> None:
            for record in records:
                if record.state in _OVER and record.number not in told:
                    told.add(record.number)
                    console.print(_line(record, score, left), markup=False)

        yield lines
        return
    seen = _Seen(score)
    with Live(get_renderable=seen.render, console=console, refresh_per_second=2, transient=True):
        yield seen


class _Seen:
    """The trainings so far, and the time that was left when they were told."""

    def __init__(self, score: str) -> None:
        self.score = score
        self.records: Sequence[Any] = ()
        self.left: float | None = None
        self.then = time.monotonic()

    def __call__(self, records: Sequence[Any], left: float | None) -> None:
        self.records, self.left, self.then = records, left, time.monotonic()

    def render(self) -> Table:
        left = None if self.left is None else max(0.0, self.left - (time.monotonic() - self.then))
        return make_table(self.records, self.score, left)


def make_table(records: Sequence[Any], score: str, left: float | None = None) -> Table:
    """The best of some trainings, and those under way."""
    over = [record for record in records if record.state in _OVER]
    done = sorted((r for r in over if r.value is not None), key=lambda record: (record.value, record.number))
    running = [record for record in records if record.state == "running"]
    title = f"{counted(len(over), 'training')}, {len(over) - len(done)} of them stopped early"
    table = Table(
        title=title if left is None else f"{title}, about {_time(left)} left",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for column in ("", "training", "lr", "epochs", "parameters", "seconds", score):
        table.add_column(column, justify="left" if column in ("", "training") else "right", overflow="fold")
    default = next((record for record in done if record.default), None)
    rows = done[: _SHOWN - len(running)]
    rows += [default] if default is not None and default not in rows else []
    for record in (*rows, *running):
        table.add_row(*_cells(record, score), style="bold" if done and record is done[0] else None)
    return table


def _cells(record: Any, score: str) -> list[str]:
    settings = record.settings
    mark = "default" if record.default else "running" if record.state == "running" else ""
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    figures = f"{settings['lr']:.2g}", f"{settings['epochs']:g}", f"{record.parameters:,}", seconds
    return [mark, record.name, *figures, _score(record, score)]


def _score(record: Any, score: str) -> str:
    """As it is, or on the way the held-out loss."""
    if record.value is not None:
        return f"{record.loss:.4f}" if score == "loss" else f"{100 * record.exact:.1f} %"
    return f"({record.curve[-1][1]:.4f})" if record.curve else ""


def _line(record: Any, score: str, left: float | None) -> str:
    settings = record.settings
    result = {"done": f"{score} {_score(record, score)}", "pruned": "stopped early", "diverged": "diverged"}
    how = f"lr {settings['lr']:.2g}, {settings['epochs']:g} epochs, {record.parameters:,} parameters"
    default = " (default)" if record.default else ""
    more = "" if left is None else f"; about {_time(left)} left"
    return f"{record.number:>3} {record.name}, {how}{default}: {result[record.state]}{more}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _tell(found: Any) -> None:
    console.print(make_table(found.trials, found.score))
    if found.importances:
        shares = (f"{name} {100 * share:.0f} %" for name, share in found.importances.items())
        console.print(f"What decided: {', '.join(shares)}.")
    best, default = found.best, found.default
    if default is not None:
        before, after = (_score(record, found.score) for record in (default, best))
        console.print(f"Held-out {found.score}: {before} with the default settings, {after} with {best.name}.")
    console.print(f"The best adapter is in {found.adapter}, its settings in {found.settings}", end="", markup=False)
    if found.picture is None:
        console.print("; for a picture of the frontier, install pyreft[plot].", markup=False)
    else:
        console.print(f", the frontier in {Path(found.picture)}.", markup=False)
    console.print(f'Try: pyreft generate --adapter {found.adapter} --prompt "..."', markup=False)
