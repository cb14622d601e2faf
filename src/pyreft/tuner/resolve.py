"""From what a call gives, or the rules of its adapters, to the located tokens of a batch: masks of absolute indices.

Done once, where a sequence begins; each forward then edits those of them that it computes.
"""

import reprlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..positions import Positions, prompt_tokens
from .call import LENGTHS, LOCATIONS, SUBSPACES, Call, Reading
from .labels import tell_of_labels, tell_of_none
from .located import Key, Located, group_rows, mask_of, subspace_masks
from .packed import Packed
from .registry import Edits
from .short import tell_of_short


def resolve(
    edits: Edits,
    call: Call,
    stack: str,
    tokens: Tensor,
    labels: Tensor | None = None,
    input_ids: Tensor | None = None,
    packed: Packed | None = None,
) -> Located:
    """Return the located tokens of a call's adapters, by what it gave.

    Args:
        stack: whose tokens they are, see `Edits`.
        tokens: `[batch, tokens]`, false for padding.
        labels: `[batch, tokens]`, -100 where there is no loss; the prompt ends before the first label.
        input_ids: `[batch, tokens]`, where they are known.
        packed: the examples of the rows, if they have several; rules hold for each of them.

    Raises:
        ReftError: locations, lengths or subspaces that do not fit the batch or the adapters.
    """
    beams = stack == "decoder" and call.generating
    kinds = {name: edits.kinds[name] for name in call.active}
    groups = None if call.row_adapters is None else group_rows(call.row_adapters, kinds, tokens, beams)
    keys = [(name, index) for name in groups or kinds for index, one in enumerate(edits.places[name]) if one == stack]
    located = Located(groups)
    located.examples = None if packed is None else packed.examples
    given = call.given.get(LOCATIONS)
    if given is not None and not isinstance(given, str):
        _add_given(located, edits, call, keys, tokens)
    else:
        otherwise = None if given is None else Positions.parse(given)  # for those without a rule
        rules = {(name, index): edits.rules[name][index] or otherwise for name, index in keys}
        lengths = call.given.get(LENGTHS) if stack != "decoder" else None
        prompt = _add_by_rule(located, rules, tokens, labels, input_ids, packed, lengths)
        edits.told_of_short = edits.told_of_short or tell_of_short(rules.values(), prompt)
        if call.trains and lengths is None and not edits.told_of_labels:
            if labels is not None:
                edits.told_of_labels = tell_of_labels(rules.values(), tokens, labels, packed)
            elif edits.causal and stack != "encoder" and "labels" not in call.given:
                edits.told_of_labels = tell_of_none(rules.values())
    if SUBSPACES in call.given:
        layers = [layer for layer in edits.layers if layer.stack == stack]
        ranks = {key: layer.rank(key) for layer in layers for key in keys if key[1] in layer.indices.get(key[0], ())}
        counts = {name: len(edits.rules[name]) for name in call.active}
        untouched = {key for layer in layers for key in keys if layer.speaks_pyvene(key)}
        located.subspaces = subspace_masks(call.given[SUBSPACES], ranks, counts, tokens, untouched)
    return located


def locate(
    edits: Edits, tokens: Tensor, labels: Tensor | None, input_ids: Tensor | None, given: dict[str, Any]
) -> Located:
    """Return what a call over whole rows would edit, without running it; see `resolve`.

    Args:
        given: what the call gives, by the names in `GIVEN`.
    """
    edits.check_given(given)
    call = edits.begin(given)
    call.trains = edits.model.training
    return resolve(edits, call, "", tokens, labels, input_ids)


def read_states(call: Call, stack: str, h: Tensor) -> Reading:
    """What a forward reads that takes pictures or sound: each state `[batch, tokens, d]` is a token of the prompt.

    States `[batch, d]` are one token for each row.
    """
    rows, tokens = h.shape[:2] if h.dim() > 2 else (len(h), 1)
    located = resolve(call.edits, call, stack, torch.ones(rows, tokens, dtype=torch.bool, device=h.device))
    return call.read(stack, located, rows, tokens, 0)


def _add_by_rule(
    located: Located,
    rules: dict[Key, Positions | None],
    tokens: Tensor,
    labels: Tensor | None,
    input_ids: Tensor | None,
    packed: Packed | None,
    lengths: Any,
) -> Tensor:
    """Add what the rules locate; return the mask of the prompts, of packed examples each by itself."""
    if packed is not None:
        tokens = packed.apart(tokens, False)
        labels = None if labels is None else packed.labels_apart(labels)
        input_ids = None if input_ids is None else packed.apart(input_ids, 0)
    if lengths is not None:
        lengths = _lengths(lengths, tokens)
        missing = max(int((lengths - tokens.sum(-1)).max()), 0)
        tokens = nn.functional.pad(tokens, (0, missing), value=True)
        input_ids = input_ids if input_ids is None or not missing else nn.functional.pad(input_ids, (0, missing))
    prompt = prompt_tokens(tokens, labels, lengths)
    masks: dict[Positions, Tensor] = {}
    for key, rule in rules.items():
        if rule is None:
            continue
        if rule not in masks:
            mask = tokens if rule.endless else rule.locate(prompt, input_ids)
            masks[rule] = mask if packed is None else packed.together(mask)
        located.add(key, masks[rule], endless=rule.endless)
    return prompt


def _add_given(located: Located, edits: Edits, call: Call, keys: list[Key], tokens: Tensor) -> None:
    at = _as_tensor(call.given[LOCATIONS], tokens, LOCATIONS)
    numbers = not at.is_floating_point() and at.dtype != torch.bool
    if at.dim() != 3 or at.shape[0] != len(tokens) or not numbers:
        raise ReftError(
            f"expected whole numbers of the shape [batch, interventions, positions] for a batch of "
            f"{len(tokens)}, got {list(at.shape)}{'' if numbers else ' of ' + str(at.dtype)}.",
            setting=LOCATIONS,
        )
    for name in call.active:
        if at.shape[1] != len(edits.rules[name]):
            raise ReftError(
                f"the adapter {name!r} has {len(edits.rules[name])} interventions, "
                f"locations came for {at.shape[1]} (shape [batch, interventions, positions] = {list(at.shape)}).",
                setting=LOCATIONS,
            )
    at = at[:, [index for _, index in keys]]
    if at.numel() and (int(at.max()) >= tokens.shape[1] or int(at.min()) < -1):
        raise ReftError(
            f"expected indices from 0 to {tokens.shape[1] - 1} in rows of {tokens.shape[1]} tokens "
            f"(-1 for none), got {int(at.min())} to {int(at.max())}.",
            setting=LOCATIONS,
        )
    same = mask_of(at[:, 0], tokens.shape[1]) if at.shape[1] and bool((at == at[:, :1]).all()) else None
    for column, key in enumerate(keys):
        located.add(key, mask_of(at[:, column], tokens.shape[1]) if same is None else same)


def _as_tensor(given: Any, tokens: Tensor, setting: str) -> Tensor:
    try:
        return torch.as_tensor(given, device=tokens.device)
    except (TypeError, ValueError, RuntimeError):
        raise ReftError(
            f"expected whole numbers, as many for each of the {len(tokens)} rows (-1 for none), got "
            f"{reprlib.repr(given)}.",
            setting=setting,
        ) from None


def _lengths(lengths: Any, tokens: Tensor) -> Tensor:
    lengths = _as_tensor(lengths, tokens, LENGTHS)
    if lengths.shape != (len(tokens),) or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ReftError(
            f"expected a number of prompt tokens for each of the {len(tokens)} rows, got {lengths.tolist()}.",
            setting=LENGTHS,
        )
    return lengths
