"""Prompts that are too short for a rule with a first and a last part: told once for a model."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..positions import Positions


def tell_of_short(rules: Iterable[Positions | None], prompt: Tensor) -> bool:
    """Warn where a prompt has one token, which neither half of such a rule takes; say whether one was given.

    Args:
        rules: by which tokens are located.
        prompt: `[batch, tokens]`, true where a token belongs to the prompt.
    """
    rule = next((rule for rule in rules if rule is not None and rule.least > 1), None)
    if rule is None or torch.compiler.is_compiling() or prompt.is_meta or not bool((prompt.sum(-1) == 1).any()):
        return False
    first, last = f"f{rule.first}", f"l{rule.last}"
    warnings.warn(
        f"A prompt has one token, such as the start token of a decoder, and '{first}+{last}' edits nothing there: each "
        f"part takes at most half of a prompt. Take '{first}' or '{last}' alone, 'prompt' or 'all'.",
        stacklevel=2,
    )
    return True
