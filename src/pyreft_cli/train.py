"""`pyreft train`: an adapter from a data file."""

import errno
from pathlib import Path
from typing import Annotated, Any

import typer

from pyreft_cli.config_file import check_positions, read_config
from pyreft_cli.console import Json, Quiet, console, counted, hush, print_json, progress_bar
from pyreft_cli.plan import cost_line

Option = typer.Option


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe of the paper: commonsense, arithmetic, instruct, glue, or a YAML file like them."
        ),
    ] = None,
    data: Annotated[
        str | None,
        Option(
            help="Examples as .jsonl, .json or .csv with prompt and completion; instruction, input and output; "
            "or chat messages."
        ),
    ] = None,
    output: Annotated[str | None, Option(help="The directory for the adapter.")] = None,
    model: Annotated[
        str | None, Option(help="Base model: a hub id or a directory; by default the embedded one.")
    ] = None,
    data_dir: Annotated[str | None, Option(help="Of a recipe: the directory of its data.  [default: the hub]")] = None,
    method: Annotated[
        str | None, Option(help="loreft, direft (of the paper), or lora to compare with.  [default: loreft]")
    ] = None,
    task: Annotated[
        str | None, Option(help="Of the recipe glue: one task.  [default: each, one after the other]")
    ] = None,
    limit: Annotated[int | None, Option(help="Of a recipe: train on the first so many examples.")] = None,
    layers: Annotated[str | None, Option(help="'all', or numbers such as '3;9;18'.  [default: all]")] = None,
    positions: Annotated[
        str | None, Option(help="Tokens to edit: f<n>, l<n>, f<n>+l<m>, prompt or all.  [default: l16]")
    ] = None,
    rank: Annotated[int | None, Option(help="Rank of the edits, or of LoRA.  [default: 8]")] = None,
    alpha: Annotated[float | None, Option(help="LoRA's scale.  [default: 16]")] = None,
    target_modules: Annotated[
        str | None, Option(help="What LoRA adapts, as 'q_proj;v_proj'.  [default: what PEFT knows of the model]")
    ] = None,
    component: Annotated[str | None, Option(help="States to edit.  [default: block_output]")] = None,
    intervention: Annotated[
        str | None,
        Option(
            help="The formula of the edit: loreft, noreft, consreft, lobireft, direft, nodireft, red, bias, reftr1, "
            "road, lofit or jola.  [default: loreft]"
        ),
    ] = None,
    share_weights: Annotated[
        bool | None,
        Option("--share-weights/--no-share-weights", help="One edit for first and last tokens.  [default: share]"),
    ] = None,
    dropout: Annotated[float | None, Option(help="Dropout on the edit.  [default: 0]")] = None,
    epochs: Annotated[float | None, Option(help="Passes over the data.  [default: 10]")] = None,
    lr: Annotated[float | None, Option(help="Learning rate.  [default: 0.001]")] = None,
    batch_size: Annotated[int | None, Option(help="Examples in a batch.  [default: 8]")] = None,
    gradient_accumulation: Annotated[int | None, Option(help="Batches in a step.  [default: 1]")] = None,
    warmup_ratio: Annotated[float | None, Option(help="Share of the steps to warm up.  [default: 0]")] = None,
    weight_decay: Annotated[float | None, Option(help="Weight decay.  [default: 0]")] = None,
    max_length: Annotated[int | None, Option(help="Most tokens of a row.  [default: the model's context]")] = None,
    format: Annotated[
        str | None,
        Option(
            help="How prompts are written: 'text' as they stand, 'chat' in the tokenizer's chat template, 'alpaca'.  "
            "[default: as the data says, else chat if there is a template]"
        ),
    ] = None,
    validation: Annotated[str | None, Option(help="A file of examples to measure the loss on.")] = None,
    validation_split: Annotated[float | None, Option(help="Or the share of the data to hold out for it.")] = None,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, float16 or auto.")] = None,
    seed: Annotated[int | None, Option(help="Seed.  [default: 42]")] = None,
    reach: Annotated[
        bool | None,
        Option("--reach/--no-reach", help="Compute only what the edits can reach.  [default: where it is exact]"),
    ] = None,
    reach_memory: Annotated[
        str | None, Option(help="How much may be held of the rest, as 4GB.  [default: half of the free memory]")
    ] = None,
    reach_directory: Annotated[str | None, Option(help="Where to put what does not fit into it.")] = None,
    save_steps: Annotated[
        int | None, Option(help="Steps between checkpoints.  [default: a tenth of the training]")
    ] = None,
    report_to: Annotated[
        str | None, Option(help="A logger that is installed: tensorboard, trackio, wandb, ...  [default: none]")
    ] = None,
    resume: Annotated[bool | None, Option("--resume", help="Go on from the last checkpoint in the output.")] = None,
    overwrite: Annotated[bool | None, Option("--overwrite", help="Replace the adapter in the output.")] = None,
    config: Annotated[
        Path | None, Option(help="A YAML file with any of the options above; those given here win.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on a file of examples, or by a recipe of the paper on the data of one of its suites.

    Everything is checked before the training starts. The output directory then holds the adapter, the loss as a
    table and a picture, and the last checkpoints.
    """
    given = {key: value for key, value in context.params.items() if key not in ("recipe", "config", "quiet", "as_json")}
    settings = {**read_config(config), **{key: value for key, value in given.items() if value is not None}}
    check_positions(settings.get("positions"))
    hush()
    from pyreft.jobs.prepare import check_files, prepare
    from pyreft.jobs.recipes import recipe_jobs
    from pyreft.jobs.settings import TrainingJob

    shown = not (quiet or as_json)
    if recipe is None:
        jobs = [TrainingJob.from_settings(settings, str(config or "train"))]
    else:
        jobs = recipe_jobs(recipe, settings)
    results = []
    for job in jobs if len(jobs) > 1 else ():
        check_files(job)  # of all, before the first is trained
    for job in jobs:
        prepared = prepare(job)
        if shown:
            _describe(prepared)
        result = _run(prepared, shown)
        results.append(result)
        if shown:
            _tell(result, job)
    if as_json:
        print_json(results[0] if len(results) == 1 else results)


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
            if error.errno != errno.ENOSPC:
                raise
            stopped = "the disk is full", 2
    if stopped:
        last = prepared.last_checkpoint()
        kept = f"The last checkpoint is {last}; go on with --resume." if last else "There is no checkpoint yet."
        typer.echo(f"pyreft: {stopped[0]}. {kept}", err=True)
        raise typer.Exit(stopped[1])
    return result


def _describe(prepared: Any) -> None:
    from pyreft.jobs.adapters import count

    if prepared.job.suite is None and prepared.format == "chat" and prepared.examples[0].format == "text":
        console.print("Prompts are wrapped in the tokenizer's chat template (--format text takes them as they stand).")
    total = prepared.model.get_base_model().num_parameters()
    trained = count(prepared.model)
    if prepared.skipped:
        console.print(f"Left out, as the prompt fills --max-length: {counted(prepared.skipped, 'example')}.")
    console.print(
        f"{counted(len(prepared.rows), 'example')}, {len(prepared.validation)} to validate on; "
        f"{trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)."
    )
    if prepared.reach is not None:
        console.print(cost_line(prepared), markup=False)


def _tell(result: dict[str, Any], job: Any) -> None:
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    if result["validation_loss"] is not None:
        loss += f", validation loss {result['validation_loss']:.4f}"
    earlier = result["earlier_steps"]
    own = counted(result["steps"] - earlier, "step")
    after = f" after {earlier:,} of an earlier run" if earlier else ""
    console.print(f"Trained {own} in {result['seconds']:.1f} s{after}{loss}.")
    if result["steps"] > earlier:
        console.print(result["computed"])
    console.print(f"The adapter is in {result['output']}, its loss in loss.csv", end="")
    console.print(" and loss.png." if result["plot"] else "; for a picture of it, install pyreft[plot].", markup=False)
    if job.suite:
        data = f" --data-dir {job.data_dir}" if job.data_dir else ""
        console.print(f"Try: pyreft eval {result['output']} --suite {job.suite}{data}", markup=False)
    else:
        console.print(f'Try: pyreft generate --adapter {result["output"]} --prompt "..."')
