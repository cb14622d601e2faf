"""Labels that do not say where a prompt ends as a rule needs it: told once for a model, while it is trained."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..positions import IGNORED, Positions
from .packed import Packed

_WAYS = (
    "with TRL, completion_only_loss=True and columns prompt and completion, or assistant_only_loss=True and one answer "
    'in each row; or edit every token, positions="all".'
)


def tell_of_labels(
    rules: Iterable[Positions | None], tokens: Tensor, labels: Tensor, packed: Packed | None = None
) -> bool:
    """Warn where the labels of a row leave no prompt, or have answers after the first; say whether one was given.

    Args:
        rules: by which tokens are located; every token's needs no prompt.
        tokens: `[batch, tokens]`, false for padding.
        labels: `[batch, tokens]`, -100 where there is no loss.
        packed: the examples of the rows, if they have several.
    """
    if torch.compiler.is_compiling() or all(rule is None or rule.endless for rule in rules):
        return False
    if packed is not None:
        tokens, labels = packed.apart(tokens, False), packed.labels_apart(labels)
    learned = (labels != IGNORED) & tokens.to(labels.device)
    first = tokens.to(labels.device) & (tokens.to(labels.device).long().cumsum(-1) == 1)
    if bool((learned & first).any()):
        warnings.warn(
            "The labels put a loss on every token of a text, so no prompt is found in it: the edits are at the end of "
            "the whole text, behind the answer, and nothing is learned there that generate would do. Put the loss on "
            f"the answers alone: {_WAYS}",
            stacklevel=2,
        )
        return True
    begins = learned[:, 1:] & ~learned[:, :-1]
    if bool((begins.sum(-1) > 1).any()):
        warnings.warn(
            "The labels of a row have several answers. Only the prompt before the first is edited, so the later ones "
            "are learned without edits of their own, as generate would make them. Give each answer a row of its own, "
            'with what comes before it as the prompt (pyreft train does); or edit every token, positions="all".',
            stacklevel=2,
        )
        return True
    return False


def tell_of_none(rules: Iterable[Positions | None]) -> bool:
    """Warn where a call to learn from has no labels, and a rule asks where prompts end; say whether one was given."""
    if torch.compiler.is_compiling() or not any(
        rule and (rule.last or rule.own or rule.whole == "prompt") for rule in rules
    ):
        return False
    warnings.warn(
        "A call in training came without labels, so each row is a prompt as a whole: if it ends with an answer, the "
        "edits are behind that, where generate makes none. Pass labels, or prompt_lengths. transformers' Trainer takes "
        "the labels off with label_smoothing_factor and compute_loss_func; pyreft.ReftTrainer does not lose them.",
        stacklevel=2,
    )
    return True
