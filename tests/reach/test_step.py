"""A step that computes only what the edits can reach equals the ordinary one."""

import functools
import types
from tempfile import TemporaryDirectory
from unittest.mock import patch

import accelerate
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

import pyreft
from architectures import ARCHITECTURES
from conftest import CACHE, FORMULAS, tiny_llama
from pyreft.interventions import Intervention
from pyreft.reach import Reach
from pyreft.reach.layers import SkipLayers
from pyreft.reach.loss import log_probs
from pyreft.reach.prefixes import SkipPrefixes
from pyreft.tuner import reft_layers
from reaching import (
    LENGTHS,
    adapt,
    assert_exact,
    assert_same,
    batch_of,
    linear_components,
    loss_and_gradients,
    rows_of,
)

SIDES = ["left", "right"]
RECURRENT = {"Mamba", "Mamba 2", "RecurrentGemma", "Jamba"}
OF_TEXT = [one for one in ARCHITECTURES if one.kind in ("causal", "image-text")]
IN_FLOAT64 = [one for one in OF_TEXT if one.name not in ("Bloom", "Gemma 2")]  # whose padding is NaN there
ENCODERS = [one for one in ARCHITECTURES if one.kind == "classifier"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("architecture", OF_TEXT, ids=lambda one: one.name)
def test_every_causal_architecture(architecture, side):
    adapted = adapt(architecture.make())
    reach = Reach(adapted)
    assert_exact(reach, adapted, batch_of(rows_of(*LENGTHS), side))
    assert type(reach._way) is (SkipLayers if architecture.name in RECURRENT else SkipPrefixes)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("architecture", ENCODERS, ids=lambda one: one.name)
def test_encoders_start_above_the_layers_below_the_edits(architecture, side):
    adapted = adapt(architecture.make())
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), side) | {"labels": torch.tensor([0, 1, 0])}
    assert_exact(reach, adapted, batch, tolerance=0)
    assert type(reach._way) is SkipLayers
    assert reach.describe().startswith("Each step leaves out 2 of 3 layers")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FORMULAS)
def test_every_intervention(name, side):
    adapted = adapt(tiny_llama(), intervention=name)
    assert_exact(Reach(adapted), adapted, batch_of(rows_of(*LENGTHS), side))


@pytest.mark.parametrize("component", ["block_input", "mlp_activation", "attention_value_output", "query_output"])
def test_components(component):
    adapted = adapt(tiny_llama(), component=component)
    reach = Reach(adapted)
    assert_exact(reach, adapted, batch_of(rows_of(*LENGTHS), "left"))
    assert reach._way.kept == 1  # the block with the edit is run


@pytest.mark.parametrize("name", ["GPT-NeoX", "Bloom", "Falcon 40B", "CodeGen"])
def test_columns_that_alternate(name):
    """The default config, in all layers: queries, keys and values of tokens that are left out come from the cache."""
    base = next(one for one in ARCHITECTURES if one.name == name).make()
    adapted = adapt(base, intervention="lora", component=["query_output", "value_output"])
    reach = Reach(adapted)
    assert_exact(reach, adapted, batch_of(rows_of(*LENGTHS), "left"))
    assert type(reach._way) is SkipPrefixes


@pytest.mark.parametrize("positions", ["l1", "l8", "f1+l2", "prompt", "all"])
@pytest.mark.parametrize("layers", ["all", 3])
def test_rules(positions, layers):
    adapted = adapt(tiny_llama(), positions=positions, layers=layers)
    reach = Reach(adapted)
    assert_exact(reach, adapted, batch_of(rows_of(9, 5, 12), "right", [3, 4, 1]))
    assert reach._way.kept == (1 if layers == "all" else 4)


def test_what_is_left_out():
    adapted = adapt(tiny_llama(), positions="l1", layers=[2])
    reach = Reach(adapted)
    batch = batch_of(rows_of(30, 30), "left", 4)
    for _ in range(2):
        reach(**batch).loss.backward()
    # from the last token of the prompt to the last but one of the row
    assert (reach._way.tokens, reach._way.computed) == (2 * 60, 2 * 2 * 4)
    width, blocks_above, key_and_value = 32 // 4 * 2, 1, 2
    held = 2 * (25 * width * blocks_above * key_and_value + 4 * 32) * 4
    assert reach.store.held == held
    line = "Each step leaves out 87 % of the tokens and 3 of 4 layers, held are 4 prefixes and states in 0.0 of "
    assert reach.describe().startswith(line)


def test_a_shared_beginning_is_held_once():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    prompt, *answers = rows_of(9, 3, 3)
    assert_exact(reach, adapted, batch_of([prompt + answer for answer in answers], "left"))
    assert len(reach.store) == 1 + 2  # a prefix, two windows
    assert_exact(reach, adapted, batch_of([prompt + answers[1], prompt + answers[0][:2]], "right", [3, 2]))
    assert len(reach.store) == 1 + 3


class Doubled(Intervention):
    """An intervention of a user's own, with a part that falls back on what is around it."""

    def __init__(self, embed_dim: int, **kwargs: object) -> None:
        super().__init__(embed_dim=embed_dim, **kwargs)
        self.size = torch.nn.Parameter(torch.ones(embed_dim))

    def edit(self, h, subspaces=None):
        return self.size * h.tanh()


def test_what_an_epoch_did_without_makes_room():
    adapted = adapt(tiny_llama())
    first, second = (batch_of(rows_of(*LENGTHS, seed=seed), "left") for seed in (1, 2))
    probe = Reach(adapted)
    probe(**first)
    reach = Reach(adapted, memory=probe.store.held)  # of one batch
    for batch in (first, first, second, second, second, second, first):
        reach.new_epoch()
        assert_exact(reach, adapted, batch)
    held = set(reach.store._entries)
    assert reach.store.full
    assert held  # of the second batch, which took the place of the first, and the first does not get it back at once
    assert not held & set(probe.store._entries)


def test_what_each_adapter_needs_is_held():
    adapted = adapt(tiny_llama(), layers=[2], positions="l1")
    adapted.add_adapter(
        "other", pyreft.ReftConfig(layers=[0], positions="l3", low_rank_dimension=2, intervention="loreft")
    )
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    for name in ("default", "other"):
        adapted.set_adapter(name)
        assert_exact(reach, adapted, batch)
    missed = reach.store.missed
    for name in ("default", "other"):
        adapted.set_adapter(name)
        assert_exact(reach, adapted, batch)
    assert reach.store.missed == missed


@pytest.mark.parametrize("exact", [True, False])
def test_log_probabilities_of_the_labels(exact):
    """Those that a preference loss is made of, with its gradients."""
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    prompt, chosen, rejected = rows_of(9, 3, 5)
    batch = batch_of([prompt + chosen, prompt + rejected], "right", [3, 5])
    if not exact:
        recomputing(adapted)

    def loss(log_probs):
        chosen, rejected = log_probs.sum(1)
        return types.SimpleNamespace(loss=-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))

    def ordinary(**batch):
        log_probs, labels = adapted(**batch).logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:, None]
        return loss(log_probs.gather(-1, labels.clamp(min=0)).masked_fill(labels == -100, 0)[..., 0])

    found = loss_and_gradients(lambda **batch: loss(reach.log_probs(**batch)), adapted, batch)
    assert_same(found, loss_and_gradients(ordinary, adapted, batch))
    assert (reach.why_not is None) is exact
    assert not exact or list(reach(**batch)) == ["loss"]


def test_ones_own_intervention():
    adapted = adapt(tiny_llama(), intervention=Doubled)
    assert_exact(Reach(adapted), adapted, batch_of(rows_of(*LENGTHS), "left"))


def random_batch(data, rows, count):
    """A batch of a few rows, whose answers, padding and perhaps locations are drawn at random."""
    draw = data.draw
    rows = [rows[row] for row in draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), label="rows")]
    answers = [draw(st.integers(1, len(row) - 2), label="answer") for row in rows]
    batch = batch_of(rows, draw(st.sampled_from(SIDES), label="side"), answers)
    if draw(st.booleans(), label="explicit"):
        first = batch["attention_mask"].argmax(1)
        at = [[draw(st.integers(0, len(row) - n), label="at")] for row, n in zip(rows, answers, strict=True)]
        batch["intervention_locations"] = (first[:, None] + torch.tensor(at))[:, None].expand(-1, count, -1)
    return batch


@settings(max_examples=40)
@given(st.data())
def test_any_training(data):
    """Epochs of any batches, with a store of any size in memory or on disk, that is begun anew in between.

    In float64, the edits, too: in float32 an unlucky draw of large edits amplifies rounding.
    """
    draw = data.draw
    architecture = draw(st.sampled_from(IN_FLOAT64), label="architecture")
    positions = draw(st.sampled_from(["l1", "l2", "l4", "f1+l1", "f2", "prompt", "all"]), label="positions")
    config = {
        "layers": draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), label="layers"),
        "positions": positions,
        "intervention": draw(st.sampled_from(FORMULAS), label="edit"),
        "share_weights": draw(st.booleans(), label="share_weights"),
    }
    lengths = draw(st.lists(st.integers(4, 14), min_size=1, max_size=6), label="lengths")
    rows = rows_of(*lengths, seed=draw(st.integers(0, 3), label="seed"))
    if draw(st.booleans(), label="one beginning"):
        rows = [rows[0][:3] + row[3:] for row in rows]
    sides = [None] if config["share_weights"] or "+" not in positions else ["prefix", "suffix"]
    count = len(config["layers"]) * len(sides)
    if config["intervention"] == "lora":  # anywhere, and several in a layer
        known = functools.partial(linear_components, architecture.make())
        first = int(architecture.name in RECURRENT)  # of which only whole layers are left out: one lies below the edits
        places = [
            {"layer": layer, "component": component, "side": side}
            for layer in sorted({max(layer, first) for layer in config.pop("layers")})
            for component in draw(st.lists(st.sampled_from(known(layer)), min_size=1, max_size=3, unique=True))
            for side in sides
        ]
        config["representations"], count = places, len(places)
    batches = [random_batch(data, rows, count) for _ in range(draw(st.integers(1, 3), label="batches"))]
    memory = draw(st.sampled_from([None, 0, 3000, 10_000]), label="memory")
    with TemporaryDirectory() as directory, patch.object(torch.Tensor, "float", torch.Tensor.double):
        settings = {"memory": memory, "directory": directory if draw(st.booleans(), label="spilled") else None}
        base = architecture.make().double()
        base.set_experts_implementation("eager")  # the products of all experts at once are not made in float64
        adapted = adapt(base, **config)
        reach = Reach(adapted, **settings)
        for _ in range(draw(st.integers(1, 3), label="epochs")):
            reach.new_epoch()
            if draw(st.booleans(), label="begun anew"):
                reach = Reach(adapted, **settings)
            for batch in draw(st.permutations(batches), label="order"):
                assert_exact(reach, adapted, batch)


@pytest.mark.parametrize("side", SIDES)
def test_sliding_windows_shorter_than_the_rows(side):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("mistral", vocab_size=96, num_key_value_heads=2, sliding_window=5, **sizes)
    adapted = adapt(AutoModelForCausalLM.from_config(config))
    reach = Reach(adapted)
    batch = batch_of(rows_of(20, 9, 14), side)
    expected = loss_and_gradients(adapted, adapted, batch)
    assert_same(loss_and_gradients(reach, adapted, batch), expected)


def test_training_to_the_end_gives_the_same_adapter_and_text():
    results = []
    for in_part in (True, False):
        adapted = adapt(tiny_llama(), positions="l1", layers="all")
        call = Reach(adapted) if in_part else adapted
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
        rows, shuffle = rows_of(*range(6, 18)), torch.Generator().manual_seed(0)
        losses = []
        for _ in range(8):
            order = torch.randperm(len(rows), generator=shuffle).tolist()
            for start in range(0, len(rows), 4):
                batch = batch_of([rows[row] for row in order[start : start + 4]], SIDES[start % 8 // 4])
                loss = call(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        weights = torch.cat([p.detach().flatten() for p in adapted.parameters() if p.requires_grad])
        prompt = {"input_ids": torch.tensor([rows[5][:-3]]), "max_new_tokens": 8, "pad_token_id": 0}
        results.append((weights, adapted.eval().generate(**prompt, do_sample=False).tolist(), losses))
    (weights, text, losses), (expected, expected_text, expected_losses) = results
    assert losses[-1] < 0.8 * losses[0]
    # Adam divides by the size of a gradient, which makes rounding of tiny ones large
    assert (weights - expected).norm() <= 1e-3 * expected.norm()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=0)
    assert text == expected_text


# -- what is held is not used when it does not hold ------------------------------------------------------------------


def changed(adapted, how):
    base = adapted.get_base_model()
    weight = base.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        if how == "in place":
            weight.mul_(2)
        elif how == "data":
            weight.data.mul_(2)
        elif how == "another order":
            weight.data.copy_(weight.data.flip(0))
        elif how == "one number":
            weight.data[3, 5] += 1
        elif how == "another tensor":
            base.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(2 * weight, requires_grad=False)
        elif how == "loaded":
            base.load_state_dict(
                {name: 1.5 * value for name, value in base.state_dict().items() if "reft" not in name}, strict=False
            )


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("how", ["in place", "data", "another order", "one number", "another tensor", "loaded"])
def test_a_changed_base_model_is_computed_anew(how, spilled, tmp_path):
    adapted = adapt(tiny_llama())
    reach = Reach(adapted, memory=0, directory=tmp_path) if spilled else Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    before = loss_and_gradients(reach, adapted, batch)
    changed(adapted, how)
    reach.new_epoch()
    assert_exact(reach, adapted, batch)
    assert loss_and_gradients(reach, adapted, batch)[0] != before[0]
    if spilled:  # nor do the files of either serve the other in a later run
        later = adapt(tiny_llama())
        assert_exact(Reach(later, memory=0, directory=tmp_path), later, batch)


def test_a_change_in_place_is_seen_within_an_epoch():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_exact(reach, adapted, batch)
    changed(adapted, "in place")
    assert_exact(reach, adapted, batch)


def test_another_active_adapter():
    adapted = adapt(tiny_llama(), layers=[2], positions="l1")
    torch.manual_seed(5)
    adapted.add_adapter(
        "other", pyreft.ReftConfig(layers=[0], positions="l3", low_rank_dimension=2, intervention="loreft")
    )
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    for name, kept in (("default", 3), ("other", 1), ("default", 3)):
        adapted.set_adapter(name)
        assert_exact(reach, adapted, batch)
        assert reach._way.kept == kept


def with_lora():
    """A LoRA that is frozen and edits that are trained."""
    base = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return adapt(base.base_model.model), base


def test_a_lora_that_is_switched_off_or_merged():
    adapted, lora = with_lora()
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_exact(reach, adapted, batch)
    with_it = loss_and_gradients(reach, adapted, batch)
    layers = [module for module in lora.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    assert_exact(reach, adapted, batch)
    assert loss_and_gradients(reach, adapted, batch)[0] != with_it[0]
    for layer in layers:
        layer.enable_adapters(True)
        layer.requires_grad_(False)
        layer.merge()
    assert_exact(reach, adapted, batch)
    assert_same(loss_and_gradients(reach, adapted, batch), with_it)


def test_a_lora_of_another_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # a large scale makes rounding large
    base = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    base.double()
    base.requires_grad_(False)
    adapted = adapt(base)  # as users give it
    batch = batch_of(rows_of(*LENGTHS), "left")
    reach = Reach(adapted, memory=0, directory=tmp_path)
    assert_exact(reach, adapted, batch, 1e-4)  # float32, whose sums a random LoRA makes large
    assert type(reach._way) is SkipPrefixes
    before = loss_and_gradients(reach, adapted, batch)
    for scale in (5.0, 2.0):
        for layer in (module for module in base.modules() if isinstance(module, LoraLayer)):
            layer.scale_layer(scale)
        later = Reach(adapted, memory=0, directory=tmp_path)  # files of another scale do not serve it
        for each in (reach, later):
            assert_exact(each, adapted, batch, 1e-4)
            assert loss_and_gradients(each, adapted, batch)[0] != before[0]


def test_a_lora_that_comes_later_and_is_trained():
    adapted = adapt(tiny_llama(), layers=[2])
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_exact(reach, adapted, batch)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, adapted.get_base_model(), "later")
    found, expected = (loss_and_gradients(call, adapted, batch) for call in (reach, adapted))
    assert_same(found, expected, 0)
    assert len(found[1]) == 3 + 2 * 4  # of the edit and of the LoRA
    assert "parameters of the base model are trained" in reach.why_not


def test_modules_that_adapters_bring_with_them():
    config = {"layers": [2], "positions": "l1", "modules_to_save": ["embed_tokens"]}
    adapted = adapt(tiny_llama(), **config)
    adapted.add_adapter("other", pyreft.ReftConfig(low_rank_dimension=2, **config))
    adapted.get_base_model().model.embed_tokens.modules_to_save["other"].weight.data.mul_(2)
    adapted.requires_grad_(False)
    batch, losses = batch_of(rows_of(*LENGTHS), "left"), []
    reach = Reach(adapted)
    with torch.no_grad():
        for name in ("default", "other"):
            adapted.set_adapter(name, inference_mode=True)
            losses.append(adapted(**batch).loss)
            torch.testing.assert_close(reach(**batch).loss, losses[-1], rtol=1e-5, atol=0)
            assert reach.why_not is None
    assert losses[0] != losses[1]


def test_edits_trained_beside_a_lora_take_the_ordinary_step():
    adapted, lora = with_lora()
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_same(loss_and_gradients(reach, adapted, batch), loss_and_gradients(adapted, adapted, batch), 0)
    assert "parameters of the base model are trained" in reach.why_not


# -- mixed precision, other numbers ----------------------------------------------------------------------------------


def distance(step, exact):
    """How far the gradients of a step are from exact ones, whose rounding is far smaller."""
    return torch.stack([(one - other).norm() for one, other in zip(step[1], exact[1], strict=True)]).norm()


def test_autocast():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    plain = loss_and_gradients(reach, adapted, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = loss_and_gradients(adapted, adapted, batch)
        found = [loss_and_gradients(reach, adapted, batch) for _ in range(2)]
    assert reach.why_not is None
    for one in found:
        assert distance(one, plain) <= 1.5 * distance(ordinary, plain)
    assert_same(loss_and_gradients(reach, adapted, batch), plain)  # nothing of the other precision is used


def test_a_base_in_bfloat16():
    batch = batch_of(rows_of(*LENGTHS), "left")
    adapted = adapt(tiny_llama().bfloat16().float())
    exact = loss_and_gradients(adapted, adapted, batch)
    adapted.get_base_model().bfloat16()
    for layer in reft_layers(adapted):
        layer.float()
    reach = Reach(adapted)
    ordinary = loss_and_gradients(adapted, adapted, batch)
    for _ in range(2):
        assert distance(loss_and_gradients(reach, adapted, batch), exact) <= 1.5 * distance(ordinary, exact)
    assert reach.why_not is None
    assert all(t.dtype == torch.bfloat16 for entry in reach.store._entries.values() for t in entry.tensors)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_learned_positions_are_told_from_rotary_ones_in_any_precision(precision):
    """A model that counts padding, with positions as smooth as trained ones, where rounding hides a few of them."""
    sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 96, "initializer_range": 0.1}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    learned = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **none))
    waves = torch.arange(1024)[:, None] / 200 * torch.randn(1, 64) + 3 * torch.randn(1, 64)
    with torch.no_grad():
        learned.transformer.wpe.weight.copy_(0.3 * waves.sin())
    for base, offsets in ((learned, True), (tiny_llama(max_position_embeddings=512), False)):
        exact = adapt(base)
        batch = batch_of(rows_of(200, 9, 40), "left", 4)
        expected = loss_and_gradients(exact, exact, batch)
        if precision == "bfloat16":
            base.bfloat16()
            for layer in reft_layers(exact):
                layer.float()
        reach = Reach(exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            ordinary = loss_and_gradients(exact, exact, batch)
            found = loss_and_gradients(reach, exact, batch)
        assert reach._way.offsets == offsets
        # rounding alone; counted the other way, the gradients are off by their own size
        assert distance(found, expected) <= 3 * distance(ordinary, expected)


def test_token_types():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4, vocab_size=96)
    adapted = adapt(AutoModelForCausalLM.from_config(config), layers=[1])
    batch = batch_of(rows_of(*LENGTHS), "left")
    typed = batch | {"token_type_ids": batch["input_ids"] % 2}
    reach = Reach(adapted)
    for each, way in ((batch, SkipPrefixes), (typed, SkipLayers), (batch, SkipPrefixes)):
        assert_exact(reach, adapted, each)
        assert type(reach._way) is way
    assert loss_and_gradients(reach, adapted, batch)[0] != loss_and_gradients(reach, adapted, typed)[0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("config", [{}, {"positions": "f2+l3"}, {"intervention": "lora", "layers": "all"}])
def test_dropout_on_the_edit_draws_the_same(config, side):
    adapted = adapt(tiny_llama(), dropout=0.5, **config)
    reach, batch = Reach(adapted), batch_of(rows_of(*LENGTHS), side)
    assert_exact(reach, adapted, batch)
    assert reach.why_not is None
    with_dropout = loss_and_gradients(adapted, adapted, batch)[0]
    assert abs(loss_and_gradients(adapted.eval(), adapted, batch)[0] - with_dropout) > 1e-3


def test_dropout_that_is_no_module():
    """OPT keeps its rate as a number, which its config does not change any more."""
    base = next(one for one in ARCHITECTURES if one.name == "OPT").make()
    for module in base.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    base.config.dropout = 0.0
    adapted = adapt(base).eval()
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_exact(reach, adapted, batch)
    adapted.train()
    assert_same(loss_and_gradients(reach, adapted, batch), loss_and_gradients(adapted, adapted, batch), 0)
    assert "computed apart differ" in reach.why_not


def test_tensors_that_keep_no_count():
    with torch.inference_mode():
        base = tiny_llama()
    adapted = adapt(base)
    batch = batch_of(rows_of(*LENGTHS), "left")
    reach = Reach(adapted)
    with torch.no_grad():
        torch.testing.assert_close(reach(**batch).loss, adapted(**batch).loss, rtol=1e-5, atol=0)


def test_serving_ends_where_it_began():
    adapted = adapt(tiny_llama()).train()
    reach, batch = Reach(adapted), batch_of(rows_of(*LENGTHS), "left")
    with reach.serving():
        reach.log_probs(**batch)
        assert list(adapted(**batch)) == ["loss"]
        adapted.eval()
        assert adapted(**batch).logits is not None  # an evaluation may ask for them
    assert adapted.train()(**batch).logits is not None


def test_the_number_of_items_of_an_accumulated_batch():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    for count in (17, torch.tensor(17)):
        assert_exact(reach, adapted, batch_of(rows_of(*LENGTHS), "left") | {"num_items_in_batch": count})


def test_positions_that_are_given():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    batch = batch_of(rows_of(*LENGTHS), "left")
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_exact(reach, adapted, batch | {"position_ids": counted})
    assert_exact(reach, adapted, batch | {"position_ids": counted + 5})
    reach(**batch, position_ids=counted.flip(1))
    assert "position_ids do not count on" in reach.why_not


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_lengths": torch.tensor([5, 2, 6])},
        {"strength": 0.5},
        {"strength": {"default": 2.0}},
        {"subspaces": [[[0]], [[1]], [[0, 1]]]},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_a_call_may_say_of_its_edits(given):
    adapted = adapt(tiny_llama(), share_weights=True, layers=[2])
    batch = batch_of(rows_of(*LENGTHS), "left")
    assert_exact(Reach(adapted), adapted, batch | given)
    assert loss_and_gradients(adapted, adapted, batch | given)[0] != loss_and_gradients(adapted, adapted, batch)[0]


@pytest.mark.parametrize("vocabulary_bytes", [1, 96 * 4 * 3, 1 << 30])
def test_log_probabilities_in_chunks(vocabulary_bytes, monkeypatch):
    monkeypatch.setattr("pyreft.reach.loss.CHUNK_BYTES", vocabulary_bytes)
    head = torch.nn.Linear(8, 96)
    hidden, targets = torch.randn(11, 8, requires_grad=True), torch.randint(0, 96, (11,))
    expected = -torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    found = log_probs(hidden, targets, head, 96)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(11)
    torch.testing.assert_close(*(torch.autograd.grad((weights * one).sum(), hidden)[0] for one in (found, expected)))


# -- where it does not hold ------------------------------------------------------------------------------------------

BATCH = batch_of(rows_of(*LENGTHS), "left")
GAP = BATCH | {"attention_mask": BATCH["attention_mask"].clone().index_fill_(1, torch.tensor([9]), 0)}


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (BATCH | {"output_attentions": True}, "the call has output_attentions"),
        (BATCH | {"use_cache": True}, "the call has use_cache"),
        (BATCH | {"labels": None}, "no input_ids or no labels"),
        (GAP, "padding lies inside of a row"),
        (BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}, "a batch has no labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_are_computed_whole(batch, reason):
    adapted = adapt(tiny_llama(), positions="l2")
    reach = Reach(adapted)
    expected = adapted(**batch).logits
    assert torch.equal(reach(**batch).logits, expected)
    assert reason in reach.why_not
    assert_exact(reach, adapted, BATCH)  # the next one is not


def recomputing(adapted):
    base = adapted.get_base_model().train()
    new = hasattr(base, "activation_checkpointing_enable")  # its name since transformers 5.2x
    (base.activation_checkpointing_enable if new else base.gradient_checkpointing_enable)({"use_reentrant": False})


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (recomputing, "gradient checkpointing recomputes whole blocks"),
        (lambda model: model.get_base_model().lm_head.weight.requires_grad_(True), "in Linear"),
        (lambda model: setattr(model.get_base_model().config, "output_router_logits", True), "output_router_logits"),
    ],
    ids=["checkpointing", "trained head", "router"],
)
def test_models_that_are_computed_whole(prepare, reason):
    adapted = adapt(tiny_llama(), layers=[0], component="block_input")
    prepare(adapted)
    reach = Reach(adapted)
    assert_same(loss_and_gradients(reach, adapted, BATCH), loss_and_gradients(adapted, adapted, BATCH), 0)
    assert reason in reach.why_not
    assert reach.describe() == f"Whole rows are computed in each step: {reach.why_not}."


def test_a_trained_head_above_the_edits_leaves_the_layers_below():
    adapted = adapt(tiny_llama())
    adapted.get_base_model().lm_head.weight.requires_grad_(True)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH, tolerance=0)
    assert type(reach._way) is SkipLayers
    missed = reach.store.missed
    adapted.get_base_model().lm_head.weight.data.mul_(1.1)
    reach.new_epoch()
    assert_exact(reach, adapted, BATCH, tolerance=0)
    assert reach.store.missed == missed  # what does not depend on the head is still held


def test_dropout_in_the_base():
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4, vocab_size=96))
    adapted = adapt(base).train()
    reach = Reach(adapted)
    reach(**BATCH)
    assert "dropout in training" in reach.why_not
    adapted.eval()
    assert_exact(reach, adapted, BATCH)


def test_angles_that_depend_on_the_length_of_a_row():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    adapted = adapt(tiny_llama(rope_parameters=rope, max_position_embeddings=10))
    reach = Reach(adapted)
    reach(**batch_of(rows_of(12, 5), "left"))
    assert "rows of more than 10 tokens" in reach.why_not
    assert_exact(reach, adapted, batch_of(rows_of(9, 5), "left"))


def test_an_encoder_and_a_decoder():
    model = next(one for one in ARCHITECTURES if one.name == "T5").make()
    adapted = adapt(model, layers=[1])
    reach = Reach(adapted)
    reach(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"])
    assert "an encoder and a decoder" in reach.why_not


def test_a_model_without_a_cache():
    base = tiny_llama()
    backbone, forward = base.model, base.model.forward

    def without_cache(*args, **kwargs):
        output = forward(*args, **kwargs)
        return type(output)(**{**output, CACHE: None})

    backbone.forward = without_cache
    adapted = adapt(base)
    reach = Reach(adapted)
    assert_exact(reach, adapted, BATCH)
    assert type(reach._way) is SkipLayers  # the layers below the edits are still left out


def test_only_a_reft_model():
    with pytest.raises(pyreft.ReftError, match=r"expected a model with representation edits, .* got LlamaForCausalLM"):
        Reach(tiny_llama())


def test_numbers_that_are_not_in_rows_or_columns(tmp_path):
    """Gemma has a buffer that is one number."""
    adapted = adapt(next(one for one in ARCHITECTURES if one.name == "Gemma 3").make())
    assert any(buffer.dim() == 0 for buffer in adapted.buffers())
    assert_exact(Reach(adapted, memory=0, directory=tmp_path), adapted, batch_of(rows_of(*LENGTHS), "left"))


def assert_whole(adapted, why):
    """The step is the ordinary one, to the bit."""
    reach, batch = Reach(adapted), batch_of(rows_of(*LENGTHS), "left")
    found, expected = loss_and_gradients(reach, adapted, batch), loss_and_gradients(adapted, adapted, batch)
    assert_same(found, expected, 0)
    assert why in reach.why_not


def test_a_loss_of_the_base_models_own_is_kept():
    adapted = adapt(tiny_llama())
    adapted.get_base_model().loss_function = lambda logits, labels, **_: logits[labels != -100].float().pow(2).mean()
    assert_exact(Reach(adapted), adapted, batch_of(rows_of(*LENGTHS), "left"))


def test_active_adapters_of_different_sizes():
    adapted = adapt(tiny_llama(), layers=[1, 2], positions="l1")
    adapted.add_adapter(
        "other", pyreft.ReftConfig(layers=[2], positions="l3", low_rank_dimension=2, intervention="loreft")
    )
    adapted.base_model.set_adapter(["default", "other"])
    assert_whole(adapted, "different numbers of interventions")


def test_weights_that_are_offloaded():
    assert_whole(adapt(accelerate.cpu_offload(tiny_llama(), execution_device="cpu")), "offloaded")
