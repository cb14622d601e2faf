"""`pyreft train`: an adapter from a data file."""

from pathlib import Path
from typing import Any

import typer

from pyreft.data.tables import ENDINGS
from pyreft.errors import is_disk_full
from pyreft_cli import options
from pyreft_cli.console import console, counted, hush, print_json, progress_bar
from pyreft_cli.early import check_data
from pyreft_cli.plan import cost_line
from pyreft_cli.settings import read_settings


def train(
    context: typer.Context,
    recipe: options.Recipe = None,
    data: options.Data = None,
    output: options.Output = None,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    method: options.Method = None,
    task: options.Task = None,
    limit: options.Limit = None,
    layers: options.Layers = None,
    positions: options.Positions = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    target_modules: options.TargetModules = None,
    component: options.Component = None,
    intervention: options.Intervention = None,
    share_weights: options.ShareWeights = None,
    dropout: options.Dropout = None,
    epochs: options.Epochs = None,
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.GradientAccumulation = None,
    warmup_ratio: options.WarmupRatio = None,
    lr_scheduler_type: options.LrSchedulerType = None,
    adam_beta1: options.AdamBeta1 = None,
    weight_decay: options.WeightDecay = None,
    max_length: options.MaxLength = None,
    long_rows: options.LongRows = None,
    turns: options.Turns = None,
    prompt_field: options.PromptField = None,
    completion_field: options.CompletionField = None,
    encoding: options.Encoding = None,
    on_error: options.OnError = None,
    format: options.Format = None,
    validation: options.Validation = None,
    validation_split: options.ValidationSplit = None,
    best: options.Best = None,
    early_stopping: options.EarlyStopping = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    reach: options.Reach = None,
    reach_memory: options.ReachMemory = None,
    reach_directory: options.ReachDirectory = None,
    save_steps: options.SaveSteps = None,
    push_to_hub: options.PushToHub = None,
    report_to: options.ReportTo = None,
    resume: options.Resume = None,
    overwrite: options.Overwrite = None,
    config: options.Config = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train an adapter on a file of examples, or by a recipe of the paper on the data of one of its suites.

    Everything is checked first. The output then holds the adapter, the loss as a table and a picture, and checkpoints.
    """
    results = [_train(job, shown=not (quiet or as_json)) for job in _make_jobs(recipe, context.params, config)]
    if as_json:
        print_json(results[0] if len(results) == 1 else results)


def _make_jobs(recipe: str | None, given: dict[str, Any], config: Path | None) -> list[Any]:
    """The one job of what is given, or those of a recipe; of several, all are checked before the first is trained."""
    settings = read_settings(given, config)
    if recipe is None:
        check_data(settings)
    elif Path(recipe).suffix.lower() in ENDINGS:
        raise typer.BadParameter(f"expected a recipe; give a file of examples as --data {recipe}.", param_hint="recipe")
    hush()
    from pyreft.jobs.prepare import check_files
    from pyreft.jobs.recipes import recipe_jobs
    from pyreft.jobs.settings import TrainingJob

    if recipe is None:
        return [TrainingJob.from_settings(settings, str(config or "train"))]
    jobs = recipe_jobs(recipe, settings)
    for job in jobs if len(jobs) > 1 else ():
        check_files(job)
    return jobs


def _train(job: Any, *, shown: bool) -> dict[str, Any]:
    from pyreft.jobs.prepare import prepare

    prepared = prepare(job)
    if shown:
        _describe(prepared)
    result = _run(prepared, shown)
    if shown:
        _show_answers(prepared)
        _tell(result, job)
    return result


def _run(prepared: Any, shown: bool) -> dict[str, Any]:
    """Train; where the training is stopped, say how to go on."""
    stopped: tuple[str, int] | None = None
    with progress_bar("Training", shown=shown) as move:
        move(0, None)
        try:
            result = prepared.train(move)
        except KeyboardInterrupt:
            stopped = "interrupted", 130
        except OSError as error:
            if not is_disk_full(error):
                raise
            stopped = "the disk is full", 2
    if stopped:
        last = prepared.last_checkpoint()
        kept = f"The last checkpoint is {last}; go on with --resume." if last else "There is no checkpoint yet."
        typer.echo(f"pyreft: {stopped[0]}. {kept}", err=True)
        raise typer.Exit(stopped[1])
    return result


def _describe(prepared: Any) -> None:
    from pyreft.jobs.methods import count

    if prepared.job.suite is None and prepared.format == "chat" and prepared.examples[0].format == "text":
        console.print("Prompts are wrapped in the tokenizer's chat template (--format text takes them as they stand).")
    total = prepared.model.get_base_model().num_parameters()
    trained = count(prepared.model)
    tally = prepared.tally
    for number, what in (
        (len(tally.wrong), "Left out, as wrong"),
        (tally.skipped, "Left out, as too long"),
        (tally.cut, "Cut from the left, as too long"),
    ):
        if number:
            console.print(f"{what}: {counted(number, 'row')}.")
    if tally.errors:
        console.print(tally.listed(), markup=False)
    if tally.unread:
        console.print(f"Not read: {tally.fields()}.", markup=False)
    if prepared.skipped:
        console.print(f"Left out, as the prompt fills --max-length: {counted(prepared.skipped, 'example')}.")
    console.print(
        f"{counted(len(prepared.rows), 'example')}, {len(prepared.validation)} to validate on; "
        f"{trained:,} of {total:,} parameters ({100 * trained / total:.3f} %), learning rate {prepared.job.lr:g}."
    )
    if prepared.shared:
        shared = f"{prepared.shared:,} to validate on are trained on, too"
        console.print(f"Of these, {shared}: their loss does not say what holds elsewhere.")
    if prepared.reach is not None:
        console.print(cost_line(prepared), markup=False)


def _show_answers(prepared: Any) -> None:
    from pyreft.jobs.samples import samples

    found = samples(prepared)
    if found:
        console.print(f"Answers to {'held-out' if prepared.validation else 'trained'} prompts, before and after:")
    for sample in found:
        console.print(f"> {sample.prompt}", style="bold", markup=False)
        for name in ("before", "after", "expected"):
            console.print(f"  {name + ':':<10}{getattr(sample, name)}", markup=False)


def _tell(result: dict[str, Any], job: Any) -> None:
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    if result["validation_loss"] is not None:
        loss += f", validation loss {result['validation_loss']:.4f}"
    earlier = result["earlier_steps"]
    own = counted(result["steps"] - earlier, "step")
    after = f" after {earlier:,} of an earlier run" if earlier else ""
    console.print(f"Trained {own} in {result['seconds']:.1f} s{after}{loss}.")
    if job.best or job.early_stopping:
        console.print(
            f"Kept is the adapter of step {result['best_step']:,}, of the lowest validation loss, {result['best']:.4f}."
        )
    if result["address"]:
        console.print(f"Uploaded to {result['address']}.", markup=False)
    if result["steps"] > earlier:
        console.print(result["computed"])
    console.print(f"The adapter is in {result['output']}, its loss in loss.csv", end="")
    console.print(" and loss.png." if result["plot"] else "; for a picture of it, install pyreft[plot].", markup=False)
    if job.suite:
        data = f" --data-dir {job.data_dir}" if job.data_dir else ""
        console.print(f"Try: pyreft eval {result['output']} --suite {job.suite}{data}", markup=False)
    else:
        console.print(f'Try: pyreft generate --adapter {result["output"]} --prompt "..."')
