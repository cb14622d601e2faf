"""`pyreft inspect`: an adapter looked at from all sides, as a page, pictures and numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from pyreft.files.online import on_disk
from pyreft_cli import options
from pyreft_cli.console import console, counted, hush, print_json


def inspect(
    adapter: options.Adapter,
    text: Annotated[list[str] | None, Option(help="A prompt to look at; may be given several times.")] = None,
    data: Annotated[
        Path | None,
        Option(help="Or a file: prompts as .txt, or examples with answers as `pyreft train` reads them."),
    ] = None,
    compare: Annotated[
        str | None, Option(help="Another adapter of the same base model, to compare with.", callback=on_disk)
    ] = None,
    output: Annotated[
        Path, Option(help="The directory for inspect.html and inspect-….png; those of an earlier run are replaced.")
    ] = Path("pyreft-inspect"),
    model: options.AdapterModel = None,
    strengths: Annotated[str, Option(help="Strengths of the edit to try, such as '0;0.5;1'.")] = (
        "0;0.25;0.5;0.75;1;1.25;1.5;1.75;2"
    ),
    limit: Annotated[int, Option(help="Rows of the file to look at, the first ones.", min=1)] = 32,
    max_new_tokens: options.MaxNewTokens = 32,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Look at an adapter: how large its edits are, which tokens they point to, and what their strength does.

    The pictures need matplotlib: pip install "pyreft[plot]". With --json, the numbers are printed and no files are
    written.
    """
    tried = _read_strengths(strengths)
    if not text and data is None:
        raise BadParameter("give a --text or a --data file to look at the adapter on.")
    if text and data is not None:
        raise BadParameter("give --text or --data, not both.")
    _check_output(output)
    hush()
    from pyreft.inspect import inspect_adapter
    from pyreft.inspect.page import write_page

    shown = not (quiet or as_json)
    with _status(shown, pictures=not as_json) as tell:
        found = inspect_adapter(
            adapter,
            texts=text or (),
            data=data,
            compare=compare,
            model=model,
            strengths=tried,
            most=limit,
            max_new_tokens=max_new_tokens,
            progress=tell,
        )
        paths = [] if as_json else write_page(found, output)
    if as_json:
        print_json(found.to_dict())
    elif shown:
        _tell(found, paths)


@contextmanager
def _status(shown: bool, *, pictures: bool) -> Iterator[Callable[[str], None]]:
    """Yield what is told of each part that begins; the first one does when all that was given is checked."""
    from pyreft.inspect.plots import check_matplotlib

    status: Any = console.status("Reading the adapter ...", spinner="line") if shown else nullcontext()

    def begin(part: str) -> None:
        if pictures:
            check_matplotlib()
        if shown:
            status.update(f"{part} ...")

    with status:
        yield begin


def _tell(found: Any, paths: list[Path]) -> None:
    from pyreft.inspect import place_names
    from pyreft.inspect.directions import first_tokens

    mean, names = found.mean, place_names(found.places)
    for number, (name, written) in enumerate(zip(names, found.directions, strict=True)):
        size, relative = (float(table[number].nanmean()) for table in (mean.size, mean.relative))
        line = f"{name}: edits of {size:.2f} on average, {100 * relative:.0f} % of the state; "
        line += f"{written.rank} {'direction carries' if written.rank == 1 else 'directions carry'} 99 %"
        if written.directions and written.directions[0].towards:
            line += f", the first towards {first_tokens(written.directions[0].towards, 5)}"
        console.print(line, markup=False)
    for curve in found.curves:
        best = min(zip(curve.losses, curve.strengths, strict=True))
        console.print(f"loss on {curve.answers}: lowest, {best[0]:.3f}, at strength {best[1]:g}", markup=False)
    if found.comparison is not None:
        _tell_comparison(found)
    console.print(f"The page is {paths[0]}, with {counted(len(paths) - 1, 'picture')} beside it.", markup=False)


def _tell_comparison(found: Any) -> None:
    from pyreft.inspect import place_names

    compared = found.comparison
    for name, entry in zip(place_names([entry.place for entry in compared.places]), compared.places, strict=True):
        line = f"{name} beside {found.other}: overlap {entry.overlap:.2f} (by chance {entry.chance:.2f})"
        if entry.cosine is not None:
            line += f", cosine of the edits {entry.cosine:.2f}"
        console.print(line, markup=False)
    alone = len(compared.only_first), len(compared.only_second)
    if any(alone):
        console.print(f"Places that only one of them edits: {alone[0]} and {alone[1]}.")


def _check_output(output: Path) -> None:
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise BadParameter(f"{existing} is a file, not a directory.", param_hint="--output")


def _read_strengths(text: str) -> list[float]:
    try:
        strengths = [float(part) for part in text.replace(",", ";").split(";") if part.strip()]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        raise BadParameter(f"expected numbers such as '0;0.5;1', got {text!r}.", param_hint="--strengths")
    return strengths
