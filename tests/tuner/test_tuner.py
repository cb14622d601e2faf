"""What the edits promise on a model: exact no-op, padding, chunks, caches, beams, PEFT's entry points, reload."""

import contextlib
import copy
import pickle
import re
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BertConfig, DynamicCache

import pyreft
from conftest import CACHE, FORMULAS, pad, shaken, tiny_llama
from pyreft.interventions import intervention_class
from pyreft.tuner.adapted import interventions_of, penalty
from pyreft.tuner.call import running
from pyreft.tuner.layer import ReftLayer

RULES = ["f2", "l1", "l4", "f2+l3", "f7+l7", "prompt", "all"]
ROTARY = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def adapt(base, **config):
    ranked = "low_rank_dimension" in intervention_class(config.get("intervention", "loreft")).setting_names()
    rank = {"intervention": "loreft", **({"low_rank_dimension": 4} if ranked else {})}
    return shaken(peft.get_peft_model(base, pyreft.ReftConfig(**rank | config)))


def one_by_one(adapted, prompts, **options):
    return [adapted.generate(input_ids=torch.tensor([p]), **GREEDY | options)[0, len(p) :].tolist() for p in prompts]


# -- which states change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intervention", FORMULAS)
def test_other_tokens_are_bit_identical_up_to_the_first_edited_layer(model, intervention):
    ids = torch.randint(3, 96, (2, 10))
    base = model(ids, output_hidden_states=True).hidden_states
    # what a token's query, key and value are, others see in the same block
    component = "attention_output" if intervention == "lora" else "block_output"
    adapted = adapt(model, layers=[1, 3], positions="f1+l2", intervention=intervention, component=component)
    edited = adapted(ids, output_hidden_states=True).hidden_states  # the embeddings, then each block's output
    for layer in (0, 1):
        assert torch.equal(edited[layer], base[layer])
    assert torch.equal(edited[2][:, 1:8], base[2][:, 1:8])
    if intervention != "reftr1":  # which leaves alone a row where the concept is not
        assert (edited[2][:, [0, 8, 9]] != base[2][:, [0, 8, 9]]).any(-1).all()


def test_tokens_before_the_first_located_one_are_never_reached(model):
    ids = torch.randint(3, 96, (1, 10))
    base = model(ids).logits
    edited = adapt(model, positions="l2")(ids).logits
    assert torch.equal(edited[:, :8], base[:, :8])
    assert (edited[:, 8:] != base[:, 8:]).any(-1).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_disabled_adapter_is_the_base_model(model, rule):
    ids = torch.randint(3, 96, (2, 10))
    base, tokens = model(ids).logits, model.generate(ids, **GREEDY)
    adapted = adapt(model, positions=rule)
    assert not torch.equal(adapted(ids).logits, base)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, base)
        assert torch.equal(adapted.generate(input_ids=ids, **GREEDY), tokens)
    assert torch.equal(adapted.unload()(ids).logits, base)


def test_the_prompt_ends_where_the_labels_begin(model):
    adapted = adapt(model, positions="l1")
    ids = torch.randint(3, 96, (2, 10))
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, 7:] = ids[0, 4:], ids[1, 7:]
    by_labels = adapted(ids, labels=labels).logits
    by_lengths = adapted(ids, prompt_lengths=[4, 7]).logits
    by_locations = adapted(ids, intervention_locations=torch.tensor([[[3]] * 4, [[6]] * 4])).logits
    assert torch.equal(by_labels, by_lengths)
    assert torch.equal(by_labels, by_locations)
    assert not torch.equal(by_labels, adapted(ids).logits)


OPENS, CLOSES = 90, 91


def marked(prompt, input_ids):
    """A rule of one's own: the tokens between two marks."""
    inside = (input_ids == OPENS).cumsum(1) > (input_ids == CLOSES).cumsum(1)
    return inside & (input_ids != OPENS)


def test_a_rule_of_ones_own_edits_marked_spans(model, tmp_path):
    places = [
        {"layer": 1, "component": "block_output", "positions": marked},
        {"layer": 2, "component": "mlp_output", "positions": "f1"},
        {"layer": 3, "component": "attention_output", "positions": "l2"},
    ]
    adapted = shaken(peft.get_peft_model(model, pyreft.ReftConfig(representations=places)))
    texts = [[5, OPENS, 6, 7, CLOSES, 8, 9], [OPENS, 5, CLOSES, 6]]
    spans = [[[2, 3], [0, -1], [5, 6]], [[1, -1], [0, -1], [2, 3]]]
    adapted.save_pretrained(tmp_path)
    for one in (adapted, peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)):
        ids, mask = pad(texts, "right")
        assert torch.equal(
            one(ids, attention_mask=mask).logits, adapted(ids, attention_mask=mask, intervention_locations=spans).logits
        )
        expected = one_by_one(one, texts)
        for side in ("left", "right"):
            ids, mask = pad(texts, side)
            tokens = one.generate(input_ids=ids, attention_mask=mask, **GREEDY)
            assert tokens[:, ids.shape[1] :].tolist() == expected


def test_a_location_that_stands_twice_is_edited_and_trained_once(model):
    adapted = adapt(model, positions="l1", layers=1)
    ids = torch.randint(3, 96, (1, 6))

    def gradients(locations):
        adapted.zero_grad()
        adapted(ids, labels=ids, intervention_locations=[[locations]]).loss.backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    for once, twice in zip(gradients([2, 4]), gradients([2, 4, 4, 2, -1]), strict=True):
        assert torch.equal(once, twice)


# -- padding, chunks, caches, beams -------------------------------------------------------------------------------


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_padded_batch_generates_what_each_prompt_does(model, prompts, rule, share_weights):
    adapted = adapt(model, positions=rule, share_weights=share_weights)
    expected = one_by_one(adapted, prompts)
    assert expected != one_by_one(adapted.unload(), prompts)
    adapted = adapt(tiny_llama(), positions=rule, share_weights=share_weights)
    expected = one_by_one(adapted, prompts)
    for side in ("left", "right"):
        ids, mask = pad(prompts, side)
        tokens = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert tokens[:, ids.shape[1] :].tolist() == expected, side


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(RULES),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    chunk=st.sampled_from([None, 1, 2, 3, 5]),
    beams=st.sampled_from([1, 1, 3]),
    use_cache=st.booleans(),
    formula=st.sampled_from(["loreft", "lora"]),
    seed=st.integers(0, 5),
)
def test_how_generation_is_carried_out_changes_nothing(rule, lengths, side, chunk, beams, use_cache, formula, seed):
    torch.manual_seed(seed)
    prompts = [torch.randint(3, 96, (n,)).tolist() for n in lengths]
    adapted = adapt(tiny_llama(), positions=rule, intervention=formula)
    expected = one_by_one(adapted, prompts, num_beams=beams)
    ids, mask = pad(prompts, side)
    options = {"num_beams": beams, "use_cache": use_cache or chunk is not None, "prefill_chunk_size": chunk}
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY | options)
    assert tokens[:, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("known", [1, 4, 8])
def test_a_prefix_from_a_cache_changes_nothing(model, prompts, rule, known):
    adapted = adapt(model, positions=rule)
    ids = torch.tensor([prompts[0]])
    expected = adapted.generate(input_ids=ids, **GREEDY)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        adapted(ids[:, :known], prompt_lengths=[ids.shape[1]], **{CACHE: cache})
    tokens = adapted.generate(input_ids=ids, **GREEDY, **{CACHE: copy.deepcopy(cache)})
    assert torch.equal(tokens, expected)
    if rule in ("l1",):  # nothing before the last token is edited, so the base model's own cache serves, too
        cache = DynamicCache(config=model.config)
        with adapted.disable_adapter(), torch.no_grad():
            adapted(ids[:, :known], **{CACHE: cache})
        assert torch.equal(adapted.generate(input_ids=ids, **GREEDY, **{CACHE: cache}), expected)


@pytest.mark.parametrize(
    ("rule", "filled", "told"),
    [
        ("l1", "by_itself", True),
        ("f1", "by_itself", False),
        ("all", "by_itself", False),
        ("l1", "disabled", False),
        ("f1", "disabled", True),
        ("f1", "other", True),
        ("l1", "turn", False),
    ],
)
def test_a_cache_of_a_prefix_that_is_edited_otherwise_is_told(model, prompts, rule, filled, told):
    adapted = adapt(model, positions=rule)
    adapted.add_adapter("other", pyreft.ReftConfig(positions="f1"))
    ids, cache = torch.tensor([prompts[0]]), DynamicCache(config=model.config)
    with torch.no_grad():
        if filled == "turn":
            adapted.generate(input_ids=ids[:, :4], max_new_tokens=2, **{CACHE: cache})
            ids = torch.cat((ids[:, :4], torch.tensor([[5, 6, 7, 8]])), 1)
        elif filled == "disabled":
            with adapted.disable_adapter():
                adapted(ids[:, :4], **{CACHE: cache})
        else:
            adapted.set_adapter("other" if filled == "other" else "default")
            adapted(ids[:, :4], **{CACHE: cache})
    adapted.set_adapter("default")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        adapted.generate(input_ids=ids, **GREEDY, **{CACHE: cache})
    assert any("The cache holds the first 4 tokens" in str(one.message) for one in found) is told


@pytest.mark.parametrize("rule", RULES)
def test_a_loop_of_ones_own_equals_generate(model, prompts, rule):
    adapted = adapt(model, positions=rule)
    ids, mask = pad(prompts, "left")
    expected = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    output = adapted(ids, attention_mask=mask, position_ids=position_ids, use_cache=True)
    found = []
    for _ in range(GREEDY["max_new_tokens"]):
        token = output.logits[:, -1:].argmax(-1)
        found.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], -1)
        output = adapted(
            token,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            **{CACHE: output[CACHE]},
        )
    assert torch.equal(torch.cat(found, -1), expected)


def test_several_answers_to_a_prompt_share_its_locations(model, prompts):
    adapted = adapt(model, positions="l2")
    ids, mask = pad(prompts, "left")
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, num_beams=4, num_return_sequences=2, **GREEDY)
    best = adapted.generate(input_ids=ids, attention_mask=mask, num_beams=4, **GREEDY)
    assert torch.equal(tokens[::2], best)


@pytest.mark.parametrize("names", [None, ["a", "__base__", "c", "b"]])
def test_without_a_cache_each_row_of_a_batch_is_edited_at_its_own_tokens(prompts, names):
    adapted = three_adapters(("l1", "f3", "prompt"))
    ids, mask = pad(prompts, "left")
    asked = {"input_ids": ids, "attention_mask": mask, "adapter_names": names, "output_logits": True}
    with_cache, without = (
        adapted.generate(**asked, return_dict_in_generate=True, use_cache=use_cache, **GREEDY)
        for use_cache in (True, False)
    )
    for found, expected in zip(without.logits, with_cache.logits, strict=True):  # of each step
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["l1", "f2+l3", "prompt"])
def test_decoding_after_the_prompt_edits_nothing(model, rule, monkeypatch):
    adapted = adapt(model, positions=rule)
    calls = []
    monkeypatch.setattr(
        ReftLayer,
        "edit",
        lambda self, h, *args, edit=ReftLayer.edit: calls.append(h.shape[1]) or edit(self, h, *args),
    )
    adapted.generate(input_ids=torch.randint(3, 96, (1, 9)), **GREEDY)
    assert calls == [9] * 4  # the prefill of four layers


def test_assisted_decoding_equals_plain(model):
    adapted = adapt(model, positions="f1+l2")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    plain = adapted.generate(input_ids=ids, **GREEDY)
    assert torch.equal(adapted.generate(input_ids=ids, prompt_lookup_num_tokens=3, **GREEDY), plain)


# -- PEFT and transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("intervention", FORMULAS)
@pytest.mark.parametrize("share_weights", [True, False])
def test_every_way_to_reload_is_bit_exact(model, tmp_path, intervention, share_weights):
    base = copy.deepcopy(model)
    base.save_pretrained(tmp_path / "base")
    ids = torch.randint(3, 96, (2, 10))
    model.name_or_path = str(tmp_path / "base")
    config = {"positions": "f1+l2", "share_weights": share_weights, "intervention": intervention}
    if "act_fn" in intervention_class(intervention).setting_names():
        config["act_fn"] = "tanh"
    adapted = adapt(model, **config)
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    reloaded = [
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        pyreft.ReftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        pyreft.ReftModel.load(tmp_path, copy.deepcopy(base)),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ]
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    for again in [*reloaded, loaded, copy.deepcopy(adapted)]:
        assert torch.equal(again(ids).logits, expected), type(again)


def test_saving_what_transformers_loaded_is_bit_exact(model, tmp_path):
    ids = torch.randint(3, 96, (2, 10))
    model.add_adapter(pyreft.ReftConfig(positions="l2", low_rank_dimension=4, intervention="loreft"))
    expected = shaken(model)(ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(ids).logits, expected)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    model.enable_adapters()
    assert torch.equal(model(ids).logits, expected)


def test_two_adapters_in_one_model(model, tmp_path):
    ids = torch.randint(3, 96, (2, 10))
    alone = {}
    for name, rule in (("first", "l1"), ("second", "f3")):
        adapted = adapt(tiny_llama(), positions=rule, layers=[0, 2])
        adapted.save_pretrained(tmp_path / name)
        alone[name] = adapted(ids).logits
    both = peft.PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        both.set_adapter(name)
        assert torch.equal(both(ids).logits, alone[name])
    both.save_pretrained(tmp_path / "both")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both" / "second", adapter_name="other")
    assert torch.equal(again(ids).logits, alone["second"])
    both.delete_adapter("first")
    both.set_adapter("second")
    assert torch.equal(both(ids).logits, alone["second"])


@pytest.mark.parametrize("names", ["typo", ["default", "typo"]])
def test_switching_to_an_adapter_that_is_not_there(model, prompts, names):
    """With which the base model would answer."""
    adapted, ids = adapt(model), torch.tensor([prompts[0]])
    expected = adapted(ids).logits
    with pytest.raises(
        pyreft.ReftError, match=r"adapter_name: expected adapters of this model \(default\), got 'typo'"
    ):
        adapted.base_model.set_adapter(names)
    assert torch.equal(adapted(ids).logits, expected)


@pytest.mark.parametrize(("field", "value"), [("positions", "all"), ("layers", [0]), ("act_fn", "relu")])
@pytest.mark.parametrize("make", [peft.get_peft_model, pyreft.get_reft_model])
def test_a_config_that_is_changed_behind_its_edits_is_not_saved(model, tmp_path, make, field, value):
    """The edits stay as they were made, and the files would say otherwise."""
    adapted = make(model, pyreft.ReftConfig(layers=[1], positions="l2", intervention="loreft"))
    config = adapted.peft_config["default"]
    before = getattr(config, field)
    setattr(config, field, value)
    with pytest.raises(pyreft.ReftError, match=rf"^{field}: the edits of 'default' were made with .* was then changed"):
        adapted.save_pretrained(str(tmp_path / "adapter"))
    setattr(config, field, before)
    adapted.save_pretrained(str(tmp_path / "adapter"))


def test_training_one_step_changes_the_edits_alone(model):
    before = copy.deepcopy(model.state_dict())
    adapted = peft.get_peft_model(
        model, pyreft.ReftConfig(positions="l2", low_rank_dimension=4, intervention="loreft")
    ).train()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 3
    assert all("reft_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(3, 96, (2, 10))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids, prompt_lengths=[4, 6]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _checkpoint(base, reentrant):
    new = hasattr(base, "activation_checkpointing_enable")  # its name since transformers 5.2x
    (base.activation_checkpointing_enable if new else base.gradient_checkpointing_enable)({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["nothing", "a reference", "shorter rows", "a second loss"])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output", "attention_output", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(component, between, reentrant):
    """Also where other forwards run before the backward: each block recomputes what it computed."""
    ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    labels, later = (ids.where(torch.arange(10) >= start, -100) for start in (4, 7))
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        place = {"intervention": "lora"} if component == "lora" else {"component": component}
        adapted = shaken(adapt(tiny_llama(), positions="l2", **place)).train()
        if checkpointing:
            _checkpoint(adapted.get_base_model(), reentrant)
            assert adapted.get_base_model().model.layers[0].gradient_checkpointing
        loss = adapted(ids, labels=labels, use_cache=False, strength=0.5).loss
        if between == "a reference":
            with torch.no_grad(), adapted.disable_adapter():
                adapted(ids, use_cache=False)
        elif between == "shorter rows":
            with torch.no_grad():
                adapted(ids[:1, :5], use_cache=False)
        elif between == "a second loss":
            loss = loss + adapted(ids.flip(1), labels=later, use_cache=False).loss
        loss.backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_penalty_under_gradient_checkpointing(reentrant):
    """It has the plain step's gradient, or says that it has none."""
    grads = []
    for checkpointing in (False, reentrant is not None):
        torch.manual_seed(3)
        ids = torch.randint(3, 96, (2, 10))
        adapted = shaken(adapt(tiny_llama(), positions="l4", component="mlp_output", intervention="reftr1")).train()
        for module in interventions_of(adapted, "default").values():
            module.top_k, module.l1 = 1, 5.0
        if checkpointing:
            _checkpoint(adapted.get_base_model(), reentrant)
        loss = adapted(ids, labels=ids, use_cache=False).loss
        if checkpointing and reentrant:
            with pytest.raises(pyreft.ReftError, match=r"penalty has no gradient.*use_reentrant"):
                penalty(adapted)
            return
        term = penalty(adapted)
        assert term > 0
        (loss + term).backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_bfloat16_model_has_float32_edits(tmp_path):
    adapted = adapt(tiny_llama().to(torch.bfloat16), positions="l2")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.randint(3, 96, (2, 10))
    expected = adapted(ids).logits
    assert expected.dtype == torch.bfloat16
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path)
    assert torch.equal(again(ids).logits, expected)


def test_the_backbone_may_be_called_without_the_head(model):
    adapted = adapt(model, positions="l2")
    ids = torch.randint(3, 96, (2, 10))
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), adapted(ids).logits)


def test_rotations_stay_orthonormal_through_training_and_reload(model, tmp_path):
    adapted = pyreft.get_reft_model(
        model, pyreft.ReftConfig(positions="l2", low_rank_dimension=4, intervention="loreft")
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        adapted(torch.randint(3, 96, (2, 8)), labels=torch.randint(3, 96, (2, 8))).loss.backward()
        optimizer.step()
    adapted.save(tmp_path)
    for one in (adapted, pyreft.ReftModel.load(tmp_path, tiny_llama())):
        for intervention in one.interventions.values():
            rotation = intervention.rotate_layer.weight.detach()
            assert (rotation.T @ rotation - torch.eye(4)).abs().max() < 1e-5


# -- what cannot be done ------------------------------------------------------------------------------------------


def test_merging_is_refused(model):
    adapted = adapt(model)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(pyreft.ReftError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize("head", [0, 2])
def test_one_head_is_edited_alone(model, head):
    seen = {}
    module = model.model.layers[1].self_attn.o_proj
    module.register_forward_pre_hook(lambda module, args: seen.update(before=args[0]))
    place = {"layer": 1, "component": "head_attention_value_output", "head": head, "positions": "l2"}
    adapted = adapt(model, representations={**place, "intervention": "red"})
    module.register_forward_hook(lambda module, args, output: seen.update(after=args[0]))
    adapted(torch.randint(3, 96, (2, 6)))
    changed = torch.zeros(2, 6, 32, dtype=torch.bool)
    changed[:, -2:, 8 * head : 8 * head + 8] = True
    assert torch.equal(seen["before"] != seen["after"], changed)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 16


def test_several_places_of_one_layer_act_in_their_order(model):
    ids = torch.randint(3, 96, (1, 6))
    place = {"layer": 2, "component": "block_output", "intervention": "red"}
    groups = [{**place, "positions": "f2"}, {**place, "positions": "l1"}, {**place, "positions": "prompt"}]
    adapted = adapt(model, representations=groups)
    with adapted.disable_adapter():
        h = adapted(ids, output_hidden_states=True).hidden_states[3].clone()
    first, last, whole = adapted.base_model.model.model.layers[2].reft_output["default"]
    h[:, :2], h[:, -1:] = first(h[:, :2]), last(h[:, -1:])
    assert torch.equal(adapted(ids, output_hidden_states=True).hidden_states[3], whole(h))


# -- several adapters ---------------------------------------------------------------------------------------------


def three_adapters(rules=("l1", "f3", "all")):
    """A model with adapters a, b and c that have different places, rules and formulas."""
    adapted = peft.get_peft_model(
        tiny_llama(), pyreft.ReftConfig(positions=rules[0], layers=[0, 2], intervention="loreft"), "a"
    )
    adapted.add_adapter("b", pyreft.ReftConfig(positions=rules[1], intervention="red", share_weights=False))
    adapted.add_adapter("c", pyreft.ReftConfig(positions=rules[2], layers=[2, 3], intervention="direft"))
    return shaken(adapted)


NAMES = ["a", "__base__", "c", "b"]


@pytest.mark.parametrize("rules", [("l1", "f3", "all"), ("f2+l2", "prompt", "l2")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_has_its_own_adapter(prompts, rules, side):
    adapted = three_adapters(rules)
    ids, mask = pad(prompts, side)
    batch = {"input_ids": ids, "attention_mask": mask}
    logits = adapted(**batch, adapter_names=NAMES).logits
    tokens = adapted.generate(**batch, adapter_names=NAMES, **GREEDY)[:, -6:].tolist()
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    searched = adapted.generate(**batch, adapter_names=NAMES, **beams)[:, -6:].tolist()
    for row, name in enumerate(NAMES):
        one = {"input_ids": torch.tensor([prompts[row]])}
        with adapted.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                adapted.set_adapter(name)
            at = mask[row].bool()
            torch.testing.assert_close(logits[row, at], adapted(**one).logits[0], atol=1e-4, rtol=1e-4)
            assert adapted.generate(**one, **GREEDY)[0, -6:].tolist() == tokens[row]
            assert adapted.generate(**one, **beams)[:, -6:].tolist() == searched[2 * row : 2 * row + 2]
    adapted.set_adapter("a")
    assert torch.equal(adapted(**batch).logits, adapted(**batch, adapter_names=["a"] * 4).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "d"], "expected adapters of this model (a, b, c) or '__base__', got 'd'."),
        (["a"], "expected one name for each of the 2 rows, got 1."),
        (["__base__"], "expected one name for each of the 2 rows, got 1."),
        (["__base__"] * 4, "expected one name for each of the 2 rows, got 4."),
        ([], "expected one name for each row, got none."),
    ],
)
def test_wrong_adapter_names(names, message):
    adapted = three_adapters()
    ids = torch.randint(3, 96, (2, 4))
    base = adapted(ids).logits
    with pytest.raises(pyreft.ReftError, match=re.escape(message)):
        adapted(ids, adapter_names=names)
    with pytest.raises(pyreft.ReftError, match=re.escape(message)):
        adapted.generate(input_ids=ids, adapter_names=names, **GREEDY)
    assert torch.equal(adapted(ids).logits, base)


def test_the_edits_of_active_adapters_are_summed(model):
    ids = torch.randint(3, 96, (2, 8))
    base = model(ids, output_hidden_states=True).hidden_states[3]
    adapted = peft.get_peft_model(model, pyreft.ReftConfig(layers=[2], positions="l3", intervention="loreft"), "a")
    adapted.add_adapter("b", pyreft.ReftConfig(layers=[2], positions="f6", intervention="nodireft"))
    shaken(adapted)
    states = {}
    for active in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        adapted.base_model.set_adapter(active)
        states["".join(active)] = adapted(ids, output_hidden_states=True).hidden_states[3]
    expected = base + (states["a"] - base) + (states["b"] - base)
    torch.testing.assert_close(states["ab"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states["ba"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_strength_multiplies_the_edit(model, strength):
    ids = torch.randint(3, 96, (2, 8))
    base = model(ids, output_hidden_states=True).hidden_states[3]
    adapted = pyreft.get_reft_model(
        model, pyreft.ReftConfig(layers=[2], positions="l2", low_rank_dimension=4, intervention="loreft")
    )
    shaken(adapted)
    full = adapted(ids, output_hidden_states=True).hidden_states[3]
    weighted = adapted(ids, output_hidden_states=True, strength=strength).hidden_states[3]
    torch.testing.assert_close(weighted, base + strength * (full - base), atol=1e-5, rtol=1e-5)
    adapted.set_strength("default", strength)
    assert torch.equal(adapted(ids, output_hidden_states=True).hidden_states[3], weighted)
    tokens = adapted.generate(ids, **GREEDY)
    adapted.set_strength("default", 1)
    assert torch.equal(adapted.generate(ids, strength=strength, **GREEDY), tokens)
    assert torch.equal(adapted.generate(ids, strength={"default": strength}, **GREEDY), tokens)
    with pytest.raises(pyreft.ReftError, match="strength: expected adapters of this model"):
        adapted(ids, strength={"defualt": 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": [0, 7]}, "layer: this model has the layers 0 to 3, got 7."),
        ({"component": "block_outptu"}, "Did you mean 'block_output'?"),
        ({"component": "model.layers[9].output"}, "component: expected one of block_input, block_output"),
        (
            {"intervention": "loreft", "low_rank_dimension": 33},
            "expected a rank from 1 to the width 32 of the edited states, got 33",
        ),
    ],
)
def test_what_does_not_fit_the_model_leaves_it_untouched(model, config, message):
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(pyreft.ReftError) as caught:
        peft.get_peft_model(model, pyreft.ReftConfig(**config))
    assert message in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names
    adapt(model)(torch.randint(3, 96, (1, 4)))  # and can be adapted after the mistake is mended


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        ([[[10]] * 4, [[1]] * 4], "expected indices from 0 to 9 in rows of 10 tokens (-1 for none), got 1 to 10"),
        ([[[1]] * 3, [[1]] * 3], "the adapter 'default' has 4 interventions, locations came for 3"),
        ([[[1]] * 4], "expected whole numbers of the shape [batch, interventions, positions] for a batch of 2"),
        ([[1], [2]], "got [2, 1]"),
        ([[[True] * 10] * 4] * 2, "for a batch of 2, got [2, 4, 10] of torch.bool"),
    ],
)
def test_wrong_locations(model, locations, message):
    with pytest.raises(pyreft.ReftError) as caught:
        adapt(model)(torch.randint(3, 96, (2, 10)), intervention_locations=locations)
    assert message in str(caught.value)


def test_an_adapter_for_another_model_is_refused(model, tmp_path):
    adapt(model).save_pretrained(tmp_path)
    for load in (peft.PeftModel.from_pretrained, pyreft.ReftModel.from_pretrained):
        with pytest.raises(pyreft.ReftError) as caught:
            load(tiny_llama(hidden_size=64), tmp_path)
        message = "The adapter was made for another base model: this one has hidden_size 64 instead of 32."
        assert str(caught.value) == message


def test_an_interrupted_forward_leaves_nothing_behind(model, monkeypatch):
    adapted = adapt(model, positions="l2")
    ids = torch.randint(3, 96, (2, 10))
    expected = adapted(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapted(ids)
    assert not running.frames
    assert torch.equal(adapted(ids).logits, expected)


def test_a_block_called_by_itself_is_refused(model):
    adapted = adapt(model, positions="l2")
    assert not running.frames
    with pytest.raises(pyreft.ReftError, match="An edited module was called outside of a call of its model"):
        model.model.layers[0](torch.ones(1, 4, 32), position_embeddings=ROTARY)
    with adapted.disable_adapter():
        model.model.layers[0](torch.ones(1, 4, 32), position_embeddings=ROTARY)


def test_an_adapted_model_can_be_pickled(model):
    adapted = adapt(model, positions="l2")
    ids = torch.randint(3, 96, (2, 10))
    expected = adapted(ids).logits
    again = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(again.generate(input_ids=ids, **GREEDY), adapted.generate(input_ids=ids, **GREEDY))


def test_labels_of_a_token_classifier_say_nothing_about_a_prompt():
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    adapted = adapt(AutoModelForTokenClassification.from_config(config).eval(), positions="f3")
    ids = torch.randint(3, 96, (2, 10))
    labels = torch.ones_like(ids).index_fill(1, torch.tensor([0]), -100)
    assert torch.equal(adapted(input_ids=ids, labels=labels).logits, adapted(input_ids=ids).logits)
