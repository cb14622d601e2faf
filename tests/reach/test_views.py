"""A view of a model computes what the model does, but for the modules that compute something else."""

import functools
import types

import accelerate
import pytest
import torch
from torch import nn

from conftest import tiny_llama
from pyreft.reach.blocks import Blocks
from pyreft.reach.views import view

IDS = torch.tensor([[5, 9, 7, 3]])


def zero(hidden_states, *args, **kwargs):
    return torch.zeros_like(hidden_states)


def expected(base, path="model.layers.1"):
    """What the model gives while a module is replaced, its own forward set aside."""
    module = base.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    found = base(IDS).logits
    handle.remove()
    return found


def closure(base):
    plain = base.model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state.tanh()
        return output

    base.model.forward = forward


def method(base):
    def forward(self, *args, **kwargs):
        output = type(self).forward(self, *args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state.tanh()
        return output

    base.model.forward = types.MethodType(forward, base.model)


def partial(base):
    def forward(module, plain, *args, **kwargs):
        output = plain(*args, **kwargs)
        output.last_hidden_state = (2 if module.training else 3) * output.last_hidden_state.tanh()
        return output

    base.model.forward = functools.partial(forward, base.model, base.model.forward)


def twice(base):
    closure(base)
    closure(base)


def recursive(base):
    plain = base.model.forward

    def forward(*args, depth=2, **kwargs):
        return forward(*args, depth=depth - 1, **kwargs) if depth else plain(*args, **kwargs)

    base.model.forward = forward


def devices(base):
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    accelerate.hooks.add_hook_to_module(base.model, accelerate.hooks.AlignDevicesHook("cpu"))


@pytest.mark.parametrize(
    "patch", [lambda base: None, closure, method, partial, twice, recursive, devices], ids=lambda patch: patch.__name__
)
def test_a_forward_that_someone_has_put_there(patch):
    base = tiny_llama()
    patch(base)
    whole, right = base(IDS).logits, expected(base)
    assert not torch.equal(whole, right)
    seen = view(base, {"model.layers.1": zero})
    assert torch.equal(seen(IDS).logits, right)
    assert torch.equal(base(IDS).logits, whole)
    assert torch.equal(view(base, {})(IDS).logits, whole)


def test_what_is_shared():
    base = tiny_llama()
    seen = view(base, {"model.layers.1": zero})
    assert type(seen) is type(base)
    assert seen.model is not base.model
    assert seen.model.layers[0] is base.model.layers[0]
    assert seen.model.layers[1] is not base.model.layers[1]
    assert seen.model.layers[1].self_attn is base.model.layers[1].self_attn
    assert dict(seen.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert all(one is other for one, other in zip(seen.parameters(), base.parameters(), strict=True))
    assert "forward" not in vars(base.model.layers[1])


def test_a_module_under_two_names():
    base = tiny_llama()
    base.model.blocks = base.model.layers
    assert torch.equal(view(base, {"model.blocks.1": zero})(IDS).logits, expected(base))


def test_a_compiled_model():
    base = tiny_llama()
    base.compile(backend="eager")
    assert torch.equal(view(base, {"model.layers.1": zero}).forward(IDS).logits, expected(base))
    torch.testing.assert_close(view(base, {"model.layers.1": zero})(IDS).logits, expected(base))


def test_blocks_begin_and_end_anywhere():
    base = tiny_llama()
    blocks = Blocks(base, [base, base.model])
    states = base.model(IDS, output_hidden_states=True).hidden_states
    for count in range(1, 5):
        found = blocks.states(base, count, input_ids=IDS)
        if count < 4:
            assert torch.equal(found, states[count])
        assert torch.equal(blocks.above(base, count, found)(IDS).logits, base(IDS).logits)
    assert torch.equal(blocks.above(base, 0, None)(IDS).logits, base(IDS).logits)


def test_a_block_in_two_places_is_run():
    base = tiny_llama()
    base.model.layers = nn.ModuleList([base.model.layers[0]] * 4)
    assert Blocks(base, [base]).below([(base.model.layers[3], "output")]) == 0
