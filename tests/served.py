"""Adapters of the embedded model with large random edits, for the tests of serving."""

import torch

import pyreft
from pyreft import pocket

RULES = {"l4": "l4", "l16": "l16", "f3l3": "f3+l3", "prompt": "prompt", "all": "all"}


def save(directory, *, seed=0, scale=0.3, **config):
    """Write an adapter of the embedded model whose edits are far from nothing."""
    model, _ = pocket.load()
    torch.manual_seed(seed)
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(**{"low_rank_dimension": 4, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "reft_" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    adapted.eval().save_pretrained(str(directory))
    return directory


def save_all(root):
    """Write an adapter for each kind of rule into a directory."""
    for seed, (name, rule) in enumerate(RULES.items()):
        save(root / name, seed=seed, positions=rule)
    return root
