"""What a step rests on is looked at in each step: whatever changes, loss and gradients are the ordinary step's."""

import functools
import types

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from conftest import tiny_llama
from pyreft.reach import Reach
from pyreft.reach.anatomy import Structure
from pyreft.reach.prefixes import SkipPrefixes
from pyreft.reach.tensors import Values
from pyreft.tuner import reft_layers
from reaching import LENGTHS, adapt, assert_exact, assert_same, batch_of, loss_and_gradients, rows_of

pytestmark = pytest.mark.usefixtures("in_float64")
BATCH = batch_of(rows_of(*LENGTHS), "left")


@pytest.fixture
def in_float64(monkeypatch):
    """Edits and logits, too, so that what is equal is so to 1e-9."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def base_model(**changes):
    return tiny_llama(**changes).double()


def scaled(forward, factor=1.5):
    """A forward that multiplies what another returns."""

    @functools.wraps(forward)
    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (factor * output[0], *output[1:]) if isinstance(output, tuple) else factor * output

    return other


# each changes a base model so that its loss is another one


def block_forward(base, patch):
    base.model.layers[0].forward = scaled(base.model.layers[0].forward)


def block_forward_bound(base, patch):
    plain = type(base.model.layers[0]).forward
    base.model.layers[0].forward = types.MethodType(scaled(plain), base.model.layers[0])


def block_forward_above(base, patch):
    plain = base.model.layers[3].forward
    base.model.layers[3].forward = lambda *args, **kwargs: plain(*args, **kwargs).tanh()


def class_forward(base, patch):
    patch.setattr(modeling_llama.LlamaMLP, "forward", scaled(modeling_llama.LlamaMLP.forward))


def function_of_the_file(base, patch):
    patch.setattr(modeling_llama, "rotate_half", lambda x: -x)


def backbone_forward(base, patch):
    plain = base.model.forward

    def forward(input_ids, **kwargs):
        return plain(input_ids=input_ids, **kwargs | {"position_ids": None, "attention_mask": None})

    base.model.forward = forward


def model_forward(base, patch):
    plain = base.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.loss = 3 * output.loss
        return output

    base.forward = forward


def model_forward_of_the_class(base, patch):
    plain = type(base).forward

    def forward(self, input_ids, **kwargs):
        return plain(self, input_ids=input_ids.clamp(max=50), **kwargs)

    patch.setattr(type(base), "forward", forward)


def hook_on_a_block(base, patch):
    base.model.layers[0].register_forward_hook(lambda module, args, output: output.cumsum(1))


def hook_on_a_block_above(base, patch):
    base.model.layers[3].register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))


def hook_before_a_block(base, patch):
    base.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


def hook_on_the_model(base, patch):
    base.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"input_ids": kwargs["input_ids"] % 50}), with_kwargs=True
    )


def hook_on_everything(base, patch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Embedding) else None
    )
    patch.callback(handle.remove)


def backward_hook(base, patch):
    base.model.layers[3].mlp.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))


def attribute(base, patch):
    base.model.layers[0].self_attn.scaling *= 3


def attribute_of_the_head(base, patch):
    base.lm_head = nn.Sequential(base.lm_head, nn.Softsign())


def weight_around_the_count(base, patch):
    base.model.layers[0].mlp.down_proj.weight.data.mul_(2)


def weight_there_and_back(base, patch):
    base.bfloat16().double()


def buffer(base, patch):
    base.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq * 2


def attention_that_can_be_chosen(base, patch):
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def sharper(module, query, key, value, *args, **kwargs):
        return plain(module, 2 * query, key, value, *args, **kwargs)

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sharper)


def input_embeddings(base, patch):
    base.set_input_embeddings(nn.Embedding(96, 32).double().requires_grad_(False))


def output_embeddings(base, patch):
    base.set_output_embeddings(nn.Linear(32, 96, bias=False).double().requires_grad_(False))


def larger_vocabulary(base, patch):
    torch.manual_seed(3)
    base.resize_token_embeddings(200).requires_grad_(False)
    base.lm_head.requires_grad_(False).weight.data.mul_(2)


def tied_weights(base, patch):
    base.lm_head.weight = base.model.embed_tokens.weight


def fewer_layers(base, patch):
    base.model.layers = nn.ModuleList([*base.model.layers[:3]])
    base.config.num_hidden_layers = 3


def another_layer(base, patch):
    base.model.layers[3] = type(base.model.layers[0])(base.config, 3).double().requires_grad_(False)


def lora(base, patch):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    peft.inject_adapter_in_model(config, base, "later")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(before.get(name.replace(".base_layer", ""), False))


def lora_above(base, patch):
    config = peft.LoraConfig(r=2, target_modules=r".*layers\.3\..*q_proj", init_lora_weights=False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    peft.inject_adapter_in_model(config, base, "later")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(before.get(name.replace(".base_layer", ""), False))
    for layer in (module for module in base.modules() if isinstance(module, LoraLayer)):
        layer.scale_layer(5.0)


CHANGES = [
    block_forward, block_forward_bound, block_forward_above, class_forward, function_of_the_file, backbone_forward,
    model_forward, model_forward_of_the_class, hook_on_a_block, hook_on_a_block_above, hook_before_a_block,
    hook_on_the_model, hook_on_everything, attribute, attention_that_can_be_chosen, attribute_of_the_head,
    weight_around_the_count, weight_there_and_back, buffer, input_embeddings, output_embeddings, larger_vocabulary,
    tied_weights, another_layer, lora, lora_above,
]  # fmt: skip


class Patch:
    """What a change of more than the model takes back in the end."""

    def __init__(self, monkeypatch, request):
        self.setattr, self.setitem = monkeypatch.setattr, monkeypatch.setitem
        self.callback = request.addfinalizer


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("layers", [[0], [1, 2]], ids=str)
def test_a_change_after_the_first_step(change, layers, monkeypatch, request):
    adapted = adapt(base_model(), layers=layers)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    before = loss_and_gradients(reach, adapted, BATCH)
    change(adapted.get_base_model(), Patch(monkeypatch, request))
    expected = loss_and_gradients(adapted, adapted, BATCH)
    assert abs(expected[0] - before[0]) > 1e-4
    for _ in range(2):
        assert_same(loss_and_gradients(reach, adapted, BATCH), expected, 1e-9)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_before_the_first_step(change, monkeypatch, request):
    adapted = adapt(base_model())
    change(adapted.get_base_model(), Patch(monkeypatch, request))
    reach = Reach(adapted)
    expected = loss_and_gradients(adapted, adapted, BATCH)
    for _ in range(2):
        assert_same(loss_and_gradients(reach, adapted, BATCH), expected, 1e-9)


class Own(nn.Module):
    """A part of a base model with what is not in its tensors or its config."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.rates, self.table, self.calls = plain, [1.0], {"bias": 0.0}, 0
        self.shift, self.named = torch.zeros(32, dtype=torch.float64), {"inner": [1.0]}

    def forward(self, h):
        factor = self.rates[0] * self.named["inner"][0] * (2 if self.training else 1)
        return factor * self.plain(h) + self.table["bias"] + self.shift


class Halved(Own):
    """Another class for it."""

    def forward(self, h):
        return super().forward(h) / 2


def with_own(layers):
    base = base_model()
    base.model.layers[0].mlp = Own(base.model.layers[0].mlp).eval()
    adapted = adapt(base, layers=layers)
    return adapted, base.model.layers[0].mlp


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.rates.__setitem__(0, 3.0),
        lambda own: own.table.update(bias=0.7),
        lambda own: own.named["inner"].append(own.named["inner"].pop() * 2),
        lambda own: own.shift.add_(0.5),
        lambda own: setattr(own, "shift", torch.ones(32, dtype=torch.float64)),
        lambda own: own.train(),
        lambda own: setattr(own, "forward", lambda h: h.tanh()),
        lambda own: setattr(own, "plain", nn.Identity()),
        lambda own: setattr(own, "__class__", Halved),
    ],
    ids=["list", "dict", "in a dict", "tensor in place", "tensor", "mode", "forward", "child", "class"],
)
@pytest.mark.parametrize("layers", [[0], [2]], ids=str)
def test_a_part_of_ones_own(change, layers):
    adapted, own = with_own(layers)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    before = loss_and_gradients(reach, adapted, BATCH)
    change(own)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert abs(loss_and_gradients(reach, adapted, BATCH)[0] - before[0]) > 1e-3


def test_a_change_is_seen_behind_a_call_that_is_computed_whole():
    adapted, own = with_own([2])
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    own.forward = lambda h: h.tanh()
    own.shift.add_(0.5)
    reach(**BATCH | {"output_attentions": True})
    adapted.get_base_model().lm_head.weight.requires_grad_(True)
    adapted.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    reach(**BATCH)
    assert "are trained" in reach.why_not
    adapted.get_base_model().lm_head.weight.requires_grad_(False)
    adapted.get_base_model().model.embed_tokens.weight.requires_grad_(False)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)


def test_what_comes_back_is_still_held():
    """As a training goes over to an evaluation, and back, nothing is lost."""
    adapted = adapt(base_model(), layers=[2])
    base, reach = adapted.get_base_model(), Reach(adapted)
    for mode in (True, False):
        base.train(mode)
        assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    missed, tried = reach.store.missed, reach._choice._probe
    for mode in (True, False, True):
        base.train(mode)
        assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert reach.store.missed == missed
    assert reach._choice._probe is tried


@pytest.mark.parametrize(
    "do",
    [
        lambda adapted: adapted.generate(BATCH["input_ids"], max_new_tokens=3, do_sample=False),
        lambda adapted: adapted(**BATCH, output_hidden_states=True, use_cache=True),
        lambda adapted: setattr(adapted.get_base_model().config, "use_cache", False),
        lambda adapted: adapted.save_pretrained(adapted.directory),
        lambda adapted: setattr(adapted.get_base_model(), "warnings_issued", {"estimate_tokens": True}),
        lambda adapted: adapted.add_adapter("other", adapted.peft_config["default"]),
        lambda adapted: adapted.get_base_model().requires_grad_(False),
    ],
    ids=["generate", "outputs", "use_cache", "save", "warnings", "another adapter", "frozen again"],
)
def test_what_changes_nothing(do, tmp_path):
    """What was held before is used after it."""
    adapted = adapt(base_model(), layers=[2])
    adapted.directory = tmp_path
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    missed = reach.store.missed
    do(adapted)
    for layer in reft_layers(adapted):
        layer.requires_grad_(True)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert reach.store.missed == missed


def test_an_evaluation_in_inference_mode():
    adapted = adapt(base_model(), layers=[1])
    reach = Reach(adapted)
    with torch.inference_mode():
        reach(**BATCH)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert len(reach.store) == 6


def test_a_model_that_changes_in_each_step():
    """Nothing that is held of it could be used again."""
    adapted, own = with_own([2])
    reach = Reach(adapted)
    expected = loss_and_gradients(adapted, adapted, BATCH)
    for _ in range(8):
        assert_same(loss_and_gradients(reach, adapted, BATCH), expected, 1e-9)
        own.calls += 1
    assert reach.why_not == "modules of the base model change from step to step"
    for _ in range(2):
        assert_same(loss_and_gradients(reach, adapted, BATCH), expected, 1e-9)
    assert reach.why_not is None
    assert type(reach._way) is SkipPrefixes


def test_another_attention():
    adapted = adapt(tiny_llama())  # in float64, padding is NaN in it
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH)
    missed = reach.store.missed
    adapted.get_base_model().set_attn_implementation("eager")
    assert_exact(reach, adapted, BATCH)
    assert reach.store.missed > missed


def test_hooks_that_are_known_to_be_harmless():
    """Those of accelerate, of transformers for outputs and for checkpointing."""
    adapted = adapt(base_model())
    base = adapted.get_base_model()
    base.enable_input_require_grads()
    base(**BATCH, output_hidden_states=True, output_attentions=True)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=1e-9)
    assert type(reach._way) is SkipPrefixes


def test_a_structure_knows_what_it_is():
    base = base_model()
    one, other = Structure(base), Structure(base_model())
    assert one.is_same()
    assert one.facts == other.facts  # also in a later run
    base.model.layers[0].input_layernorm.variance_epsilon = 0.1
    assert not one.is_same()
    assert Structure(base).facts != one.facts
    base.model.layers[0].input_layernorm.variance_epsilon = 1e-6
    assert Structure(base).facts == one.facts


class Tensors(nn.Module):
    """One of every kind."""

    def __init__(self):
        super().__init__()
        kinds = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
        for number, kind in enumerate(kinds):
            self.register_buffer(f"of{number}", torch.ones(40).to(kind))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("number", torch.tensor(3.0))
        self.register_buffer("across", torch.randn(6, 8).T)
        self.plain = torch.randn(9)
        with torch.inference_mode():
            self.uncounted = torch.randn(50)


def test_values_of_every_kind():
    module = Tensors()
    values = Values([module])
    assert values.is_same_to_the_bit()
    for name in ("of0", "of1", "of2", "of3", "of4", "number", "plain", "uncounted"):
        tensor = getattr(module, name)
        with torch.inference_mode():
            tensor.data.copy_(torch.zeros_like(tensor))
        assert not values.is_same()
        values = Values([module])
    module.across.data.mul_(2)
    assert not values.is_same_to_the_bit()


def test_a_tensor_at_the_address_of_another():
    linear = nn.Linear(64, 64)
    values = Values([linear])
    same = linear.weight.data.clone()
    address = linear.weight.data_ptr()
    linear.weight.data = torch.empty(0)
    for _ in range(100):  # until the allocator gives it again
        linear.weight.data = same.clone()
        if linear.weight.data_ptr() == address:
            break
    assert not values.is_same()
