"""Interventions of one's own in pyvene's shape: subclasses of its classes, of a formula, and a replaced forward."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import pyreft
from conftest import shaken, tiny_llama
from pyreft.interventions import (
    DistributedRepresentationIntervention,
    LocalistRepresentationIntervention,
    LowRankRotateLayer,
    SourcelessIntervention,
    TrainableIntervention,
)

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(5))
BASE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SEEN: list = []


class AddIntervention(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, keep_last_dim=True)
        self.b = nn.Parameter(torch.linspace(-1, 1, self.embed_dim) * kwargs.get("scale", 1.0))

    def forward(self, base, source=None, subspaces=None):
        SEEN.append((tuple(base.shape), subspaces))
        return base + self.b


class TwiceIntervention(pyreft.LoreftIntervention):
    """h + 2 R^T W h."""

    def forward(self, base, source=None, subspaces=None):
        SEEN.append((tuple(base.shape), subspaces))
        return base + torch.matmul(self.learned_source(base) * 2, self.rotate_layer.weight.T)


class CopiedIntervention(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    """LoReFT, written as the original writes it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, keep_last_dim=True)
        rotate_layer = LowRankRotateLayer(self.embed_dim, kwargs["low_rank_dimension"], init_orth=True)
        self.rotate_layer = orthogonal(rotate_layer)
        self.learned_source = nn.Linear(self.embed_dim, kwargs["low_rank_dimension"])

    def forward(self, base, source=None, subspaces=None):
        edit = self.learned_source(base) - self.rotate_layer(base)
        return base + torch.matmul(edit, self.rotate_layer.weight.T)


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def adapt(*interventions, **changes):
    places = [{"layer": layer, "intervention": one} | changes for layer, one in enumerate(interventions, 1)]
    return pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=places)).eval()


def at(*rows, interventions=1):
    return {"sources->base": (None, [[list(row) for row in rows]] * interventions)}


def states(model, **call):
    """Behind the edited layer 1, `[batch, tokens, d]`, of the base model and edited."""
    base, edited = model(BASE, output_original_output=True, output_hidden_states=True, **call)
    return base.hidden_states[2], edited.hidden_states[2]


def test_the_rows_and_positions_that_a_call_names():
    module = AddIntervention(embed_dim=32)
    model = adapt(module)
    before, after = states(model, unit_locations=at([1, 7], [0, 3]))
    expected = before.clone()
    expected[[0, 0, 1, 1], [1, 7, 0, 3]] += module.b
    torch.testing.assert_close(after, expected)
    assert SEEN == [((2, 2, 32), None)]
    assert list(model.interventions.values()) == [module]
    assert model.interventions["layer_1_comp_block_output_unit_pos_nunit_1#0"][0] is module
    assert model.count_parameters() == 32


def test_rows_of_several_lengths():
    module = AddIntervention(embed_dim=32)
    model = adapt(module, positions="f3+l4")
    mask = torch.tensor([[1] * 8, [1] * 2 + [0] * 6])
    before = model.model(input_ids=IDS, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    with model.disable_adapter():
        plain = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    assert SEEN[0] == ((2, 7, 32), None)
    edited = (before != plain).any(-1)
    assert edited[0].tolist() == [True] * 3 + [False] + [True] * 4
    assert edited[1, :2].tolist() == [True, True]
    torch.testing.assert_close(before[edited], (plain + module.b)[edited])


def test_the_subspaces_as_the_call_gives_them():
    model = adapt(AddIntervention(embed_dim=32), TwiceIntervention(embed_dim=32, low_rank_dimension=4))
    everywhere = {"unit_locations": at([0, 4], [1, 4], interventions=2)}
    model(BASE, **everywhere, subspaces=[[[0, 1], [2, 9]], None])
    assert SEEN == [((2, 2, 32), [[0, 1], [2, 9]]), ((2, 2, 32), None)]
    SEEN.clear()
    concept = {"idx": torch.tensor([3, 1])}
    model.generate(BASE, **everywhere, subspaces=[concept, concept], intervene_on_prompt=True, **OPTIONS)
    assert [subspaces is concept for _, subspaces in SEEN] == [True, True]
    SEEN.clear()
    beams = {"unit_locations": at([4], [1], interventions=2), "subspaces": [[[0], [1]], [[2], [3]]]}
    model.generate(BASE, **beams, num_beams=2, **OPTIONS)
    assert SEEN == [((4, 1, 32), [[0], [0], [1], [1]]), ((4, 1, 32), [[2], [2], [3], [3]])]
    SEEN.clear()
    model(BASE, unit_locations=at([], [1], interventions=2), subspaces=[[[0], [1]], [[2], [3]]])
    assert SEEN == [((1, 1, 32), [[1]]), ((1, 1, 32), [[3]])]


def test_a_formula_of_ones_own_beside_those_of_this_library():
    module = TwiceIntervention(embed_dim=32, low_rank_dimension=4)
    model = shaken(adapt(module, pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4), positions="l2"))
    before, after = states(model)
    h = before[:, -2:]
    expected = h + 2 * module.learned_source(h) @ module.rotate_layer.weight.T
    torch.testing.assert_close(after[:, -2:], expected)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.get_trainable_parameters())


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: AddIntervention(embed_dim=32, scale=3.0), {"b"}),
        (
            lambda: TwiceIntervention(embed_dim=32, low_rank_dimension=4),
            {"learned_source.weight", "learned_source.bias", "rotate_layer.free"},
        ),
        (
            lambda: CopiedIntervention(embed_dim=32, low_rank_dimension=4),
            {
                *("learned_source.weight", "learned_source.bias", "rotate_layer.parametrizations.weight.0.base"),
                "rotate_layer.parametrizations.weight.original",
            },
        ),
    ],
)
def test_saved_and_loaded(make, keys, tmp_path):
    module = make()
    assert module.state_dict().keys() == keys
    model = adapt(module, positions="l2")
    model.interventions.load_state_dict(model.interventions.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
        expected = model(IDS).logits
    model.save(tmp_path)
    for interventions in ((), [type(module)]):  # it is known by now, and may be named
        loaded = pyreft.ReftModel.load(tmp_path, tiny_llama(), interventions=interventions)
        assert torch.equal(loaded(IDS).logits, expected)
    loaded.load_intervention(tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    (again,) = loaded.interventions.values()
    assert type(again) is type(module)
    if isinstance(module, AddIntervention):
        assert again.settings == {"scale": 3.0}


def test_what_the_original_writes_computes_what_ours_does():
    theirs = CopiedIntervention(embed_dim=32, low_rank_dimension=4)
    ours = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4)
    ours.learned_source.load_state_dict(theirs.learned_source.state_dict())
    ours.rotate_layer.set_(theirs.rotate_layer.weight)
    call = {"unit_locations": at([1, 7], [0, 3])}
    torch.testing.assert_close(states(adapt(theirs), **call)[1], states(adapt(ours), **call)[1])


class PlainIntervention(SourcelessIntervention):
    def forward(self, base, source=None, subspaces=None):
        SEEN.append((tuple(base.shape), subspaces))
        return SimpleNamespace(output=base * 2, latent=None)


class SingleIntervention(PlainIntervention, LocalistRepresentationIntervention):
    pass


@pytest.mark.parametrize(("cls", "shape"), [(PlainIntervention, (2, 64)), (SingleIntervention, (2, 2, 32))])
def test_positions_together_and_an_output_with_a_name(cls, shape):
    before, after = states(adapt(cls(embed_dim=32)), unit_locations=at([1, 7], [0, 3]))
    assert [(shape, None)] == SEEN
    rows, columns = [0, 0, 1, 1], [1, 7, 0, 3]
    torch.testing.assert_close(after[rows, columns], 2 * before[rows, columns])


def test_a_forward_that_is_replaced(monkeypatch):
    def forward(self, base, source=None, subspaces=None):
        SEEN.append(tuple(base.shape))
        return base + 1

    call = {"unit_locations": at([1, 7], [0, 3])}
    one, other = (pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4) for _ in range(2))
    model, plain = adapt(one), adapt(other)
    expected = states(plain, **call)[1]
    one.forward = forward.__get__(one)
    before, after = states(model, **call)
    torch.testing.assert_close(after[0, 7], before[0, 7] + 1)
    assert torch.equal(states(plain, **call)[1], expected)
    monkeypatch.setattr(pyreft.LoreftIntervention, "forward", forward)
    before, after = states(plain, **call)
    torch.testing.assert_close(after[0, 7], before[0, 7] + 1)
    plain.add_adapter("second", copy.deepcopy(plain.peft_config["default"]))
    rows = plain(**BASE, adapter_names=["default", "second"], intervention_locations=[[[1, 7]]] * 2).logits
    assert torch.equal(rows[0], plain(**BASE, intervention_locations=[[[1, 7]]] * 2).logits[0])
    assert SEEN == [(2, 2, 32)] * 2 + [(1, 2, 32)] * 2 + [(2, 2, 32)]


class AgainIntervention(pyreft.LoreftIntervention):
    def forward(self, base, source=None, subspaces=None):
        return super().forward(base, source, subspaces)


def test_the_formula_asked_as_in_pyvene():
    module = AgainIntervention(embed_dim=32, low_rank_dimension=4)
    plain = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4)
    plain.load_state_dict(module.state_dict())
    for call in ({}, {"subspaces": [[[0, 2], [1]]]}, {"subspaces": [{"idx": 1}]}):
        call["unit_locations"] = at([1, 7], [0, 3])
        found, expected = (states(adapt(copy.deepcopy(one)), **call)[1] for one in (module, plain))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_model_of_another_type(dtype):
    module = TwiceIntervention(embed_dim=32, low_rank_dimension=4)
    model = adapt(module, positions="l2")
    model.get_base_model().to(dtype)
    model.interventions.float()
    before, after = states(model)
    assert after.dtype == dtype
    h = before[:, -2:].float()
    expected = h + 2 * module.learned_source(h) @ module.rotate_layer.weight.T
    torch.testing.assert_close(after[:, -2:], expected.to(dtype))


class AskedFor(pyreft.LoreftIntervention):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.times = kwargs["times"]

    def forward(self, base, source=None, subspaces=None):
        return base * self.times


def test_further_arguments(tmp_path):
    for given in ({"init_orth": True}, {"keep_last_dim": True, "use_fast": False, "layer": 3}):
        assert pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2, **given).settings["low_rank_dimension"] == 2
    with pytest.raises(pyreft.ReftError, match="act_fun: LoreftIntervention does not take it"):
        pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2, act_fun="relu")
    model = adapt(AskedFor(embed_dim=32, low_rank_dimension=4, times=3, init_orth=True), positions="l2")
    model.save(tmp_path)
    (again,) = pyreft.ReftModel.load(tmp_path, tiny_llama()).interventions.values()
    assert again.times == 3
    place = {"layer": 1, "intervention": AskedFor, "intervention_kwargs": {"times": 2}, "low_rank_dimension": 2}
    (made,) = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=place)).interventions.values()
    assert (made.times, made.low_rank_dimension) == (2, 2)
    with pytest.raises(pyreft.ReftError, match="no AskedFor can be made with"):
        pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(layers=[1], intervention=AskedFor))


class BiasIntervention(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    """Called as one of this library; a part of it is not to be trained."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, keep_last_dim=True)
        self.b = nn.Parameter(torch.ones(self.embed_dim))
        self.kept = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, base, source=None, subspaces=None):
        return base + self.b + self.kept.sum()


def test_a_class_called_as_one_of_this_library(tmp_path):
    model = adapt(BiasIntervention(embed_dim=32), positions="l2")
    with torch.no_grad():
        next(iter(model.interventions.values())).b.mul_(torch.linspace(0, 3, 32))
        expected = model(IDS).logits
    model.save(tmp_path)
    assert pyreft.ReftConfig(intervention="bias").intervention == "bias"
    loaded = pyreft.ReftModel.load(tmp_path, tiny_llama(), interventions=[BiasIntervention])
    assert type(next(iter(loaded.interventions.values()))) is BiasIntervention
    assert torch.equal(loaded(IDS).logits, expected)


def test_what_was_made_frozen_stays_so():
    model = adapt(BiasIntervention(embed_dim=32), positions="l2")
    assert model.count_parameters() == 32
    model.set_requires_grad("default")
    assert model.count_parameters() == 32
    model.add_adapter("v1.5", pyreft.ReftConfig(layers=[1], intervention=BiasIntervention, positions="l1"))
    for name in ("v1.5", "default"):
        model.set_adapter(name)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32
    model.delete_adapter("v1.5")
    model.set_adapter("default")
    assert model.count_parameters() == 32


def test_what_peft_has_frozen_is_trained_where_it_is_given_again():
    model = adapt(BiasIntervention(embed_dim=32), positions="l2")
    (used,) = model.interventions.values()
    model.set_adapter("default", inference_mode=True)
    assert model.count_parameters() == 0
    assert adapt(copy.deepcopy(used), positions="l2").count_parameters() == 32


def test_what_is_no_intervention_is_told():
    with pytest.raises(pyreft.ReftError, match=r"or a module with forward\(base, source=None, subspaces=None\), got"):
        pyreft.ReftConfig(representations={"layer": 1, "intervention": nn.Linear(32, 32)})
    with pytest.raises(pyreft.ReftError, match="is 32 wide, the intervention given for it 16"):
        adapt(AddIntervention(embed_dim=16))
    with pytest.raises(NotImplementedError, match="SourcelessIntervention has no forward"):
        adapt(SourcelessIntervention(embed_dim=32))(BASE, unit_locations=at([1], [1]))


def test_the_only_one_of_a_pair():
    module = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2)
    assert module[0] is module
    with pytest.raises(IndexError, match=r"only \[0\] is left, got \[1\]"):
        module[1]


def test_with_pyvenes_own_classes(tmp_path):
    pyvene = pytest.importorskip("pyvene")

    class Mine(
        pyvene.SourcelessIntervention, pyvene.TrainableIntervention, pyvene.DistributedRepresentationIntervention
    ):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, keep_last_dim=True)
            self.b = nn.Parameter(torch.ones(self.embed_dim))

        def forward(self, base, source=None, subspaces=None):
            return pyvene.models.interventions.InterventionOutput(output=base + self.b)

    model = adapt(Mine(embed_dim=32), positions="l2")
    before, after = states(model)
    torch.testing.assert_close(after[:, -2:], before[:, -2:] + 1)
    model.save(tmp_path)
    assert torch.equal(pyreft.ReftModel.load(tmp_path, tiny_llama())(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("read", [lambda base, source: base + source, lambda base, source: source.clone()])
def test_one_that_reads_a_source_is_told(read):
    class SwapIntervention(TrainableIntervention):
        def forward(self, base, source, subspaces=None):
            return read(base, source)

    model = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(layers=[1], positions="l2", intervention=SwapIntervention)
    )
    with pytest.raises(pyreft.ReftError, match=r"SwapIntervention: .*NoneType.*\. If it reads a source, the states"):
        model(**BASE)


def test_a_buffer_of_a_formulas_subclass_is_its_own(tmp_path):
    """Also by a name under which the original stored a size."""

    class ScaledIntervention(pyreft.LoreftIntervention):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_buffer("interchange_dim", torch.tensor(1.0))

        def formula(self, h, R):
            return h + self.interchange_dim * (super().formula(h, R) - h)

    made = pyreft.ReftConfig(layers=[1], positions="l2", low_rank_dimension=2, intervention=ScaledIntervention)
    model = shaken(pyreft.get_reft_model(tiny_llama(), made))
    model.interventions[model.sorted_keys[0]].interchange_dim.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = pyreft.ReftModel.load(tmp_path, tiny_llama())
    assert torch.equal(again(**BASE).logits, model(**BASE).logits)
