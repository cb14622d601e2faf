"""Rows of a batch with adapters of their own: what each row does alone, computed together where the formulas allow."""

import contextlib
import copy

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyreft
from architectures import ARCHITECTURES
from conftest import FORMULAS, pad, shaken, tiny_llama
from pyreft.interventions import Intervention, LoreftIntervention, intervention_class, stack
from pyreft.tuner.located import Located

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
ADAPTERS = ["a", "b", "c"]


class DampIntervention(Intervention):
    """A formula of one's own that nothing is said about."""

    def __init__(self, *, embed_dim, **settings):
        super().__init__(embed_dim=embed_dim, **settings)
        self.amount = torch.nn.Parameter(torch.zeros(embed_dim))

    def edit(self, h):
        return -self.amount * h


class StackableDampIntervention(DampIntervention):
    stackable = True


def ranked(formula):
    names = intervention_class(formula).setting_names()
    return {"low_rank_dimension": 4} if "low_rank_dimension" in names else {}


def neox():
    return next(one for one in ARCHITECTURES if one.name == "GPT-NeoX").make()


def many(formula="loreft", base=None, adapters=ADAPTERS, **config):
    config = {"layers": [1, 2] if base else [1, 3], "intervention": formula, **ranked(formula), **config}
    adapted = peft.get_peft_model(tiny_llama() if base is None else base, pyreft.ReftConfig(**config), adapters[0])
    for name in adapters[1:]:
        adapted.add_adapter(name, pyreft.ReftConfig(**config))
    return shaken(adapted)


@contextlib.contextmanager
def only(adapted, name):
    with adapted.disable_adapter() if name == "__base__" else contextlib.nullcontext():
        if name != "__base__":
            adapted.set_adapter(name)
        yield


@pytest.fixture
def edits(monkeypatch):
    """The shapes of the states that pass a formula."""
    shapes = []
    forward = Intervention.forward
    monkeypatch.setattr(
        Intervention, "forward", lambda self, h, **context: shapes.append(h.shape) or forward(self, h, **context)
    )
    return shapes


@pytest.mark.parametrize("formula", [*FORMULAS, DampIntervention, StackableDampIntervention])
def test_every_formula_by_row_is_that_of_each_row_alone(formula):
    adapted = many(formula, positions="f1+l2")
    ids = torch.randint(3, 96, (5, 9))
    names = ["b", "a", "__base__", "c", "a"]
    together = adapted(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        with only(adapted, name):
            alone = adapted(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)  # products of another shape round so


@pytest.mark.parametrize("formula", ["loreft", "lora"])
def test_columns_that_alternate_by_row_are_those_of_each_row_alone(formula):
    adapted = many(formula, neox(), positions="f1+l2", component="value_output")
    ids = torch.randint(3, 90, (3, 9))
    together = adapted(ids, adapter_names=["b", "__base__", "a"]).logits
    alone = []
    for row, name in enumerate(["b", "__base__", "a"]):
        with only(adapted, name):
            alone.append(adapted(ids[row : row + 1]).logits)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(alone[0], neox()(ids[:1]).logits, atol=1e-2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    formulas=st.lists(st.sampled_from(["loreft", "nodireft", "red", "lora", DampIntervention]), min_size=3, max_size=3),
    rule=st.sampled_from(["f2", "l1", "f2+l3", "prompt", "all"]),
    names=st.lists(st.sampled_from([*ADAPTERS, "__base__"]), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    chunk=st.sampled_from([None, 2, 5]),
    beams=st.sampled_from([1, 3]),
    strength=st.sampled_from([1.0, 0.5, {"a": 0.5, "b": 2.0}]),
    seed=st.integers(0, 9),
)
def test_a_batch_generates_what_each_row_does_with_its_adapter(
    formulas, rule, names, side, chunk, beams, strength, seed
):
    torch.manual_seed(seed)
    adapted = many(formulas[0], adapters=["a"], positions=rule)
    for name, formula in zip(["b", "c"], formulas[1:], strict=True):
        config = {"layers": [1, 3], "positions": rule, "intervention": formula, **ranked(formula)}
        adapted.add_adapter(name, pyreft.ReftConfig(**config))
    shaken(adapted)
    prompts = [torch.randint(3, 96, (int(n),)).tolist() for n in torch.randint(1, 10, (len(names),))]
    ids, mask = pad(prompts, side)
    options = {**GREEDY, "num_beams": beams, "strength": strength}
    together = adapted.generate(
        input_ids=ids, attention_mask=mask, adapter_names=names, prefill_chunk_size=chunk, **options
    )
    for prompt, name, found in zip(prompts, names, together, strict=True):
        with only(adapted, name):
            alone = adapted.generate(input_ids=torch.tensor([prompt]), **options)
        assert found[-4:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize(
    ("formula", "calls"), [("loreft", 2), (StackableDampIntervention, 2), (DampIntervention, 6), ("reftr1", 6)]
)
def test_adapters_of_one_kind_are_edited_at_once(edits, formula, calls):
    adapted = many(formula, positions="f1+l2")
    adapted(torch.randint(3, 96, (3, 9)), adapter_names=["c", "a", "b"])
    assert len(edits) == calls  # two layers, times three adapters if these cannot be stacked
    assert sum(shape[:-1].numel() for shape in edits) == 2 * 3 * 3


def test_adapters_with_other_settings_are_a_kind_of_their_own(edits):
    adapted = many(positions="l2", adapters=["a", "b"])
    adapted.add_adapter(
        "c", pyreft.ReftConfig(layers=[1, 3], positions="l1", low_rank_dimension=4, intervention="loreft")
    )
    shaken(adapted)(torch.randint(3, 96, (3, 9)), adapter_names=["a", "b", "c"])
    assert [list(shape) for shape in edits] == [[2, 2, 32], [1, 32]] * 2


@pytest.mark.parametrize("rule", ["l1", "f2+l3", "prompt"])
def test_decoding_after_the_prompt_edits_nothing(edits, rule):
    adapted = many(positions=rule)
    adapted.generate(input_ids=torch.randint(3, 96, (3, 9)), adapter_names=ADAPTERS, **GREEDY)
    assert len(edits) == 2


def test_gradients_by_row_are_those_of_each_row_alone():
    adapted = many(positions="f1+l2").train()
    ids = torch.randint(3, 96, (3, 9))

    def gradients(rows):
        adapted.zero_grad()
        for which, names in rows:
            adapted(ids[which], adapter_names=names).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}

    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("reft_" in name)
    together = gradients([([0, 1, 2], ["b", "a", "b"])])
    alone = gradients([([0], ["b"]), ([1], ["a"]), ([2], ["b"])])
    assert together.keys() == alone.keys()
    assert {name.split(".reft_output.")[1][0] for name in together} == {"a", "b"}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-3, rtol=1e-4)


def test_subspaces_are_chosen_by_row():
    adapted = many(positions="l2")
    ids = torch.randint(3, 96, (3, 9))
    chosen = [[[0, 1]] * 2, [[2]] * 2, [[3, 0]] * 2]
    together = adapted(ids, adapter_names=["b", "a", "__base__"], subspaces=chosen).logits
    for row, name in enumerate(["b", "a"]):
        adapted.set_adapter(name)
        alone = adapted(ids[row : row + 1], subspaces=chosen[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("formula", [name for name in FORMULAS if intervention_class(name).stackable])
@pytest.mark.parametrize("mode", [True, False])
def test_a_stack_edits_each_row_with_one_of_its_formulas(formula, mode):
    cls = intervention_class(formula)
    widths = {"embed_dim": 8} | ({"input_dim": 6} if cls.reads_input else {})
    edits = [cls(**widths, **ranked(formula)) for _ in range(3)]
    for edit in edits:
        edit.train(mode and formula != "jola")  # whose gates are drawn at random in training
        for parameter in edit.parameters():
            torch.nn.init.normal_(parameter)
    h, x = torch.randn(3, 4, 8), torch.randn(3, 4, 6)
    read = [{"x": row} if cls.reads_input else {} for row in (*x, x)]
    expected = torch.stack([edit(row, **more) for edit, row, more in zip(edits, h, read[:3], strict=True)])
    torch.testing.assert_close(stack(edits)(h, **read[3]), expected, atol=1e-5, rtol=1e-5)


def test_a_formula_that_inherits_from_a_stackable_one_is_not():
    class OwnIntervention(LoreftIntervention):
        def edit(self, h, subspaces=None):
            return h.mean(0, keepdim=True) + super().edit(h)

    assert LoreftIntervention.stackable
    assert not OwnIntervention.stackable


def test_a_swap_of_weights_between_two_batches_is_seen():
    adapted = many(positions="l2").eval()
    other = copy.deepcopy(adapted)
    shaken(other)
    ids = torch.randint(3, 96, (3, 9))
    with torch.inference_mode():
        before = adapted(ids, adapter_names=ADAPTERS).logits
        expected = other(ids, adapter_names=ADAPTERS).logits
    adapted.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(adapted(ids, adapter_names=ADAPTERS).logits, expected)
    assert not torch.equal(before, expected)


def test_adapters_of_mixed_types_on_a_bfloat16_model():
    adapted = many(base=tiny_llama().to(torch.bfloat16), positions="l2")
    for name, parameter in adapted.named_parameters():
        if ".b." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    ids = torch.randint(3, 96, (3, 9))
    together = adapted(ids, adapter_names=ADAPTERS).logits
    assert together.dtype == torch.bfloat16
    for row, name in enumerate(ADAPTERS):
        adapted.set_adapter(name)
        alone = adapted(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=0.2, rtol=0.1)  # bfloat16 rounds all that follows


def test_adapters_on_mixed_devices_say_so():
    adapted = many(positions="l2")
    for layer in pyreft.tuner.reft_layers(adapted):
        layer["b"].to("meta")
    with pytest.raises(pyreft.ReftError, match="The edits of adapter 'b' are on meta, the states on cpu; move them"):
        adapted(torch.randint(3, 96, (2, 9)), adapter_names=["a", "b"])


def test_locations_of_each_layer_in_some_of_the_rows():
    """Each layer edits at its own tokens, and only in the rows that have the adapter."""
    adapted = many(adapters=["a", "b"], layers="all", positions="l1")
    adapted.add_adapter("other", pyreft.ReftConfig(layers=[0, 1, 2, 3], intervention="noreft", low_rank_dimension=2))
    shaken(adapted)
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    locations = [[[layer + 2 * row, 8 - layer] for layer in range(4)] for row in range(3)]
    names = ["a", "other", "__base__"]
    together = adapted(ids, intervention_locations=locations, adapter_names=names).logits
    for row, name in enumerate(names):
        with only(adapted, name):
            alone = adapted(ids[row : row + 1], intervention_locations=locations[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone)


def test_masks_that_nobody_keeps_are_told_apart():
    located = Located({"a": ["a", None]})
    wanted = [torch.rand(2, 5, generator=torch.Generator().manual_seed(index)) > 0.5 for index in range(50)]
    for index, mask in enumerate(wanted):
        located.add(("a", index), mask.clone())
    for index, mask in enumerate(wanted):
        assert located.masks["a", index].tolist() == [mask[0].tolist(), [False] * 5]


@pytest.mark.parametrize("rule", ["l1", "l2", "f1+l2", "all"])
def test_states_with_heads_apart_are_edited(rule):  # `[batch, tokens, heads, d]`, as the norm of queries has them
    qwen3 = next(one for one in ARCHITECTURES if one.name == "Qwen3").make()
    norm = qwen3.get_submodule(component := "model.layers.1.self_attn.q_norm")
    place = {"component": f"{component}.output", "positions": rule, "low_rank_dimension": 4}
    adapted = pyreft.get_reft_model(qwen3, pyreft.ReftConfig(representations=place), adapter_name="a")
    adapted.add_adapter("b", pyreft.ReftConfig(representations=place))
    shaken(adapted)
    ids, mask = pad([[5, 6, 7, 8], [9, 10]], "left")
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    together = adapted(input_ids=ids, attention_mask=mask, adapter_names=["a", "b"]).logits
    for row, name in enumerate("ab"):
        with only(adapted, name):
            alone = adapted(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(together[row, mask[row].bool()], alone[row, mask[row].bool()], atol=1e-5, rtol=1e-4)
    intervention = adapted.base_model.model.get_submodule(component).reft_output["b"][0]
    with adapted.disable_adapter():
        adapted(input_ids=ids, attention_mask=mask)
    edited, plain = seen[2][0], seen[3][0]  # by `b`, and by the base model alone
    torch.testing.assert_close(edited[-1], intervention(plain[-1]))
    assert rule == "all" or torch.equal(edited[1], plain[1])
