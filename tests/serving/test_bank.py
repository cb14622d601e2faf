"""Formulas by slot against the interventions themselves; which adapter leaves."""

import pytest
import torch

from conftest import FORMULAS
from pyreft.errors import ReftError
from pyreft.interventions import intervention_class
from pyreft.positions import Positions
from pyreft.serving.affine import affine, rank_of
from pyreft.serving.bank import Bank, Slots
from pyreft.serving.tokens import Place, Row, plan, same

WIDTH, HERE = 12, Place(0, 0)
RANKED = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
SERVED = [(name, {}) for name in FORMULAS if name not in (*RANKED, "reftr1", "lora")]
SERVED += [(name, {"low_rank_dimension": rank}) for name in RANKED for rank in (1, 3)]
SERVED += [(name, {"low_rank_dimension": 2, "act_fn": act}) for name in RANKED for act in ("relu", "gelu")]
SERVED += [(name, {"low_rank_dimension": 2, "add_bias": True}) for name in ("noreft", "nodireft")]
SERVED += [("noreft", {"low_rank_dimension": 2, "add_bias": True, "act_fn": "silu"})]


def make(name, settings):
    module = intervention_class(name)(embed_dim=WIDTH, **settings).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def edit_of(name, settings, module):
    tensors = {key: value.detach() for key, value in module.state_dict().items()}
    if "rotate_layer.free" in tensors:
        tensors["R"] = module.rotate_layer.weight.detach().mT
    return affine(name, tensors, settings.get("act_fn"))


def tile_of(rows, starts):
    """The one table of a step in which every token of these rows is edited."""
    pattern = same({HERE: 0})
    slots = {number: Row(slot, pattern, (Positions(whole="all"),), 1) for number, slot in enumerate(rows)}
    return plan(slots, starts, [0] * len(rows)).at(HERE).tiles()


@pytest.mark.parametrize(("name", "settings"), SERVED)
def test_a_slot_edits_as_the_intervention_does(name, settings):
    module, h = make(name, settings), torch.randn(5, WIDTH)
    needs = rank_of(name, settings.get("low_rank_dimension"), settings.get("act_fn"))
    bank = Bank(slots=3, rank=needs + 1, width=WIDTH)
    bank.write(1, {HERE: edit_of(name, settings, module)})
    (tile,) = tile_of([1], [0, 5])
    torch.testing.assert_close(h + bank.delta(HERE, tile, h[tile.at])[0], module(h))
    (tile,) = tile_of([0], [0, 5])  # an empty slot
    assert not bank.delta(HERE, tile, h[tile.at]).any()


def test_tokens_of_many_slots_are_edited_together_each_with_its_own():
    chosen = [
        ("loreft", {"low_rank_dimension": 3}),
        ("red", {}),
        ("direft", {"low_rank_dimension": 2, "act_fn": "relu"}),
    ]
    chosen += [("road", {}), ("bias", {}), ("loreft", {"low_rank_dimension": 2, "act_fn": "gelu"})]
    modules = [make(*each) for each in chosen]
    bank = Bank(slots=8, rank=4, width=WIDTH)
    for slot, (each, module) in enumerate(zip(chosen, modules, strict=True)):
        bank.write(slot, {HERE: edit_of(*each, module)})
    rows, starts = [3, 0, 5, 2, 4, 1, 2], [0, 4, 5, 8, 27, 28, 30, 31]
    h = torch.randn(31, WIDTH)
    out = h.clone()
    for tile in tile_of(rows, starts):
        edited = h[tile.at] + bank.delta(HERE, tile, h[tile.at])
        valid = torch.ones_like(tile.at, dtype=torch.bool) if tile.valid is None else tile.valid
        out[tile.at[valid]] = edited[valid]
    expected = [modules[slot](h[a:b]) for slot, a, b in zip(rows, starts, starts[1:], strict=False)]
    torch.testing.assert_close(out, torch.cat(expected))


def test_slots_that_follow_each_other_are_read_where_they_are():
    bank = Bank(slots=5, rank=6, width=WIDTH)
    for slot, (name, settings) in enumerate(SERVED[3::6]):
        bank.write(slot, {HERE: edit_of(name, settings, make(name, settings))})
    (tile,) = tile_of([2, 1, 3], [0, 2, 4, 6])
    assert tile.slots == slice(1, 4)
    h = torch.randn(6, WIDTH)[tile.at]
    assert torch.equal(bank.delta(HERE, tile, h), bank.delta(HERE, tile._replace(slots=torch.tensor([1, 2, 3])), h))


def test_a_slot_that_is_written_again_has_nothing_left_of_the_old():
    bank = Bank(slots=2, rank=4, width=WIDTH)
    old = {Place(n, 0): edit_of("direft", s, make("direft", s)) for n, s in enumerate([{"low_rank_dimension": 4}] * 2)}
    old[Place(0, 1)] = edit_of("road", {}, make("road", {}))
    bank.write(1, old)
    settings = {"low_rank_dimension": 2, "act_fn": "relu"}
    module, h = make("direft", settings), torch.randn(5, WIDTH)
    bank.write(1, {HERE: edit_of("direft", settings, module)})
    (tile,) = tile_of([1], [0, 5])
    torch.testing.assert_close(bank.delta(HERE, tile, h[tile.at])[0], module(h) - h)
    for place in (Place(1, 0), Place(0, 1), Place(9, 0)):
        assert not bank.delta(place, tile, h[tile.at]).any()
    assert bank.behind == {0: [Place(0, 0), Place(0, 1)], 1: [Place(1, 0)]}


def test_a_strength_multiplies_the_edit():
    module, h = make("loreft", {"low_rank_dimension": 2}), torch.randn(4, WIDTH)
    bank = Bank(slots=1, rank=2, width=WIDTH)
    bank.write(0, {HERE: edit_of("loreft", {"low_rank_dimension": 2}, module)})
    rows = {n: Row(0, same({HERE: 0}), (Positions(whole="all"),), 2, s) for n, s in enumerate((0.5, -2.0))}
    (tile,) = plan(rows, [0, 2, 4], [0, 0]).at(HERE).tiles()
    factor = torch.tensor([0.5, 0.5, -2, -2]).view(-1, 1)
    torch.testing.assert_close(bank.delta(HERE, tile, h[tile.at])[0], factor * (module(h) - h))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    bank = Bank(slots=1, rank=3, width=WIDTH)
    settings = {"low_rank_dimension": 2, "act_fn": "relu"}
    with pytest.raises(ReftError, match="needs 4 coordinates, the slots have 3; start the engine with a rank of 4"):
        bank.write(0, {HERE: edit_of("loreft", settings, make("loreft", settings))})
    with pytest.raises(ReftError, match="6 wide, the states are 12"):
        bank.write(0, {HERE: affine("bias", {"bias": torch.ones(6)})})
    assert bank.behind == {}
    with pytest.raises(ReftError, match="'reftr1' cannot be served"):
        affine("reftr1", {})
    with pytest.raises(ReftError, match="no activation is called 'rellu'"):
        affine("direft", {}, "rellu")


def test_the_least_recently_used_leaves_and_one_in_use_never_does():
    slots, loaded = Slots(2), []
    take = lambda name: slots.take(name, lambda slot: loaded.append((name, slot)))  # noqa: E731
    assert [take("a"), take("b"), take("a")] == [0, 1, 0]
    with pytest.raises(ReftError, match="All 2 slots are in use"):
        take("c")
    for name in ("a", "b", "a"):
        slots.release(name)
    assert take("c") == 1  # b was used before a
    assert loaded == [("a", 0), ("b", 1), ("c", 1)]
    with pytest.raises(ReftError, match="c is in use"):
        slots.drop("c")
    slots.release("c")
    slots.drop("c")
    assert take("d") == 1
    assert "a" in slots.of


def test_a_failed_load_takes_no_slot():
    slots = Slots(1)

    def fail(slot):
        raise ReftError("damaged")

    with pytest.raises(ReftError, match="damaged"):
        slots.take("a", fail)
    assert slots.take("b", lambda slot: None) == 0
