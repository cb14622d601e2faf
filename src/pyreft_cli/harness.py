"""`pyreft eval --tasks`: lm-eval's tasks on an adapter."""

import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from rich.table import Table

from pyreft_cli.console import console, hush, print_json


def print_tasks(
    adapter: str,
    tasks: Sequence[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    include_path: Path | None = None,
    batch_size: int = 16,
    limit: float | None = None,
    num_fewshot: int | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Run tasks of lm-eval on an adapter and print what each measures; see `pyreft.harness.evaluate`.

    Args:
        quiet: without lm-eval's own bars and notices.
    """
    hush()
    from pyreft.harness import evaluate

    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        results = evaluate(
            adapter,
            tasks,
            model=model,
            dtype=dtype,
            include_path=include_path,
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
        )["results"]
    table = Table()
    for name in ("task", "measure", "value", "± standard error"):
        table.add_column(name)
    plain: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        for name, value in values.items():
            measure, _, filtered = name.partition(",")
            if not filtered or measure.endswith("_stderr") or not isinstance(value, int | float):
                continue
            shown = measure if filtered == "none" else f"{measure} ({filtered})"
            plain.setdefault(task, {})[shown] = value
            error = values.get(f"{measure}_stderr,{filtered}")
            table.add_row(task, shown, f"{value:.4f}", f"{error:.4f}" if isinstance(error, int | float) else "")
    if as_json:
        print_json(plain)
    else:
        console.print(table)
