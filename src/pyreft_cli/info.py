"""`pyreft info`: what an adapter edits."""

from typing import Annotated, Any

import typer

from pyreft_cli import options
from pyreft_cli.console import console, hush, print_json


def info(
    adapter: options.Adapter,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Show which tokens of this prompt are edited; may be given several times."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Check that the adapter fits this base model, and take it for --text.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what an adapter edits, where, with how many parameters, and which tokens of a text."""
    hush()
    from pyreft.describe import describe, located_tokens
    from pyreft.loading import check_adapter

    facts: dict[str, Any] = describe(adapter)
    if model is not None:
        check_adapter(adapter, model)
        facts["fits"] = model
    if text:
        facts["tokens"] = {each: located_tokens(adapter, each, model) for each in text}
    if as_json:
        print_json(facts)
        return
    console.print(f"Base model   {facts['base_model']}", markup=False)
    if model is not None:
        console.print(f"Fits         {model}", markup=False)
    console.print(f"Parameters   {facts['parameters']:,}")
    for place in facts["places"]:
        rank = f" of rank {place['rank']}" if place["rank"] else ""
        more = {"dropout": place["dropout"] or None, **place["settings"]}
        console.print(
            f"Edits        {place['intervention']}{rank}, {place['component']} of "
            f"layer{'' if len(place['layers']) == 1 else 's'} {', '.join(map(str, place['layers']))}, "
            f"tokens {place['positions']}"
            + "".join(f", {name} {value}" for name, value in more.items() if value is not None),
            markup=False,
        )
    for rules in facts.get("tokens", {}).values():
        for rule, tokens in rules.items():
            console.print(f"\nTokens of the rule {rule}, the edited ones in brackets:", markup=False)
            console.print(" ".join(f"[{t['token']}]" if t["edited"] else t["token"] for t in tokens), markup=False)
