"""`pyreft eval --data`: an adapter's loss on held-out examples, and its answers beside those expected."""

from typing import Any

from pyreft_cli.console import console, counted, hush, print_json, progress_bar
from pyreft_cli.early import check_data

_SHOWN = 10


def score(
    adapter: str,
    data: str,
    given: dict[str, Any],
    *,
    long_rows: str | None,
    limit: int | None,
    max_new_tokens: int | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score, and print the figures and the first answers.

    Args:
        given: how the data is read, see `pyreft.data.files.Reading`.
    """
    given = given | {"limit": limit}
    check_data({"data": data, **given})
    hush()
    from pyreft.data.files import Reading
    from pyreft.jobs.held_out import evaluate_file

    with progress_bar("Answering", shown=not (quiet or as_json), unit="prompts") as move:
        how: dict[str, Any] = {"reading": Reading(**given), "max_new_tokens": max_new_tokens or 64, "progress": move}
        how["long_rows"] = long_rows or "refuse"
        result = evaluate_file(adapter, data, **how, **settings)
    if as_json:
        print_json(result)
        return
    if result["wrong"]:
        console.print(f"Left out, as wrong: {counted(result['wrong'], 'row')}.\n{result['listed']}", markup=False)
    for name, what in (("skipped", "Left out, as too long"), ("cut", "Cut from the left, as too long")):
        if result[name]:
            console.print(f"{what}: {counted(result[name], 'row')}.")
    for answer in result["answers"][:_SHOWN]:
        console.print(f"{'right' if answer['right'] else 'wrong'}  {answer['where']}", style="bold", markup=False)
        console.print(f"  prompt:   {answer['prompt']}", markup=False)
        console.print(f"  expected: {answer['expected']}", markup=False)
        console.print(f"  answer:   {answer['answer']}", markup=False)
    if len(result["answers"]) > _SHOWN:
        console.print(f"... and {len(result['answers']) - _SHOWN:,} more; --json has all of them.")
    console.print(
        f"{counted(result['count'], 'answer')}: {100 * result['exact']:.1f} % are exactly as expected, loss "
        f"{result['loss']:.4f}."
    )
