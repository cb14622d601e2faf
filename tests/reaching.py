"""What the tests of `pyreft.reach` share: ragged batches, and steps to compare."""

import contextlib

import torch

import pyreft
from conftest import pad, shaken
from pyreft.interventions import LowRankIntervention, intervention_class
from pyreft.places.components import LINEAR, find_blocks, find_site
from pyreft.tuner import reft_layers

LENGTHS = (11, 7, 8)


def rows_of(*lengths, seed=1):
    """Random rows of ids."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (length,), generator=draw).tolist() for length in lengths]


def batch_of(rows, side, answers=3):
    """A padded batch of rows, with labels for the last tokens of each."""
    counts = answers if isinstance(answers, list) else [answers] * len(rows)
    ids, mask = pad(rows, side)
    labels, _ = pad([[-100] * (len(r) - n) + r[len(r) - n :] for r, n in zip(rows, counts, strict=True)], side, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapt(base, *, seed=0, **config):
    """Large edits in training above a base in evaluation, where it has no dropout."""
    torch.manual_seed(seed)
    defaults = {"intervention": "loreft", "positions": "l2"} | (
        {} if "representations" in config else {"layers": [1, 2]}
    )
    if issubclass(intervention_class(config.get("intervention", "loreft")), LowRankIntervention):
        defaults["low_rank_dimension"] = 2
    adapted = shaken(pyreft.get_reft_model(base, pyreft.ReftConfig(**defaults | config)))
    for layer in reft_layers(adapted):
        layer.train()
    if config.get("intervention") == "lora":  # large queries and keys leave no gradient but rounding
        with torch.no_grad():
            for parameter in adapted.get_trainable_parameters():
                parameter.mul_(0.3)
    return adapted


def linear_components(base, layer):
    """The components of a block that are what linear layers write; where there are none, the first one by its path."""
    found = []
    for name in (*LINEAR, "down_output"):
        with contextlib.suppress(pyreft.ReftError):
            find_site(base, name, layer, linear=True)
            found.append(name)
    path, blocks = find_blocks(base)
    linear = (name for name, module in blocks[layer].named_modules() if isinstance(module, torch.nn.Linear))
    return found or [f"{path}.{layer}.{next(linear)}.output"]


def loss_and_gradients(call, adapted, batch):
    """The loss of a batch and the gradients of everything that is trained."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    torch.manual_seed(0)  # for gates that are drawn
    loss = call(**batch).loss
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def assert_same(found, expected, tolerance=1e-5):
    """Loss and all gradients are equal; in float32, sums in another order differ by 1e-6 of the largest gradient."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=1e-7)
    size = torch.stack([gradient.norm() for gradient in expected[1]]).max()
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).norm() <= tolerance * size


def assert_exact(reach, adapted, batch, tolerance=1e-5):
    """A step computed in part equals the ordinary one, when the rest is computed and when it is held."""
    expected = loss_and_gradients(adapted, adapted, batch)
    for _ in range(2):
        assert_same(loss_and_gradients(reach, adapted, batch), expected, tolerance)
    assert reach.why_not is None
