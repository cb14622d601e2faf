"""Columns of fused projections, by what attention does with them: each model's own code is asked, not the table.

What is called the query of a token decides where that token looks, the key who looks at it, the value what is seen.
"""

import peft
import pytest
import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention

import pyreft
from architectures import ARCHITECTURES, NO_GATE, causal
from conftest import shaken, tiny_llama
from pyreft.places.components import find_site
from pyreft.places.lookup import Columns

MORE = [
    causal("GPT-BigCode with keys for each head", "gpt_bigcode", lacks=NO_GATE, n_inner=64, multi_query=False),
    causal("GPT-NeoX Japanese", "gpt_neox_japanese", lacks=NO_GATE, intermediate_multiple_size=2),
]
MAKE = {one.name: one.make for one in (*ARCHITECTURES, *MORE)}
HEADS, WIDTH, TOKEN = 4, 8, 2  # of each model; and the token of six that is edited
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
# how many heads keys and values have
SHARED = {"GPT-2": 4, "GPT-BigCode": 1, "Phi-3": 2, "MPT": 4, "ModernBERT": 4, "GPT-NeoX": 4, "Bloom": 4, "Falcon": 1}
SHARED |= {"Falcon 40B": 2, "Falcon RW": 4, "Persimmon": 4, "CodeGen": 4} | {one.name: 4 for one in MORE}
ALTERNATING = ["GPT-NeoX", "Bloom", "Falcon 40B", "Falcon RW", "Persimmon", "CodeGen", *(one.name for one in MORE)]

DEEPSEEK = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
}

fused = pytest.mark.parametrize("name", SHARED)


@pytest.fixture
def model(name):
    made = MAKE[name]()
    made.set_attn_implementation("eager")
    return made


def width_of(module):
    return module.nf if hasattr(module, "nf") else module.out_features


def indices(model, site):
    """Where a site's numbers are among all that the projection writes."""
    return site.columns.take(torch.arange(width_of(model.get_submodule(site.path))))


@torch.no_grad()
def attention(model, site=None):
    """Of the first layer: who looks at whom, `[heads, from, to]`, and what is seen, `[tokens, heads, width]`.

    Args:
        site: of which one token's numbers are changed.
    """
    seen = []

    def change(module, args, output):
        output = output.clone()
        output[:, TOKEN, indices(model, site)] *= -2
        return output

    def keep(module, args):
        seen.append(args[0][0].view(-1, HEADS, WIDTH))

    hooks = [model.get_submodule(find_site(model, "attention_value_output", 0).path).register_forward_pre_hook(keep)]
    if site is not None:
        hooks.append(model.get_submodule(site.path).register_forward_hook(change))
    try:
        looked = model(torch.arange(3, 9)[None], output_attentions=True).attentions[0][0]
    finally:
        for hook in hooks:
            hook.remove()
    assert looked.shape == (HEADS, 6, 6)
    return looked, *seen


def others_alike(before, after):
    """Whether the shares of all tokens but the edited one are, among themselves, what they were."""
    rest = [i for i in range(6) if i != TOKEN]
    shares = [looked[..., rest] / looked[..., rest].sum(-1, keepdim=True) for looked in (before, after)]
    return torch.allclose(*shares, rtol=1e-4, atol=1e-6)


@fused
def test_a_query_decides_where_its_token_looks(name, model):
    (before, _), (after, _) = attention(model), attention(model, find_site(model, "query_output", 0))
    rows = [row for row in range(6) if row != TOKEN]
    assert torch.equal(after[:, rows], before[:, rows])
    assert (after[:, TOKEN] != before[:, TOKEN]).any(-1).all()  # of every head
    assert not others_alike(before, after)


@fused
def test_a_key_decides_who_looks_at_its_token(name, model):
    (before, _), (after, _) = attention(model), attention(model, find_site(model, "key_output", 0))
    rows = before[0, :, TOKEN] > 0  # that see it
    assert torch.equal(after[:, ~rows], before[:, ~rows])
    assert (after[:, rows, TOKEN] != before[:, rows, TOKEN]).all()
    assert others_alike(before[:, rows], after[:, rows])


@fused
def test_a_value_decides_what_is_seen(name, model):
    (before, seen), (after, others) = attention(model), attention(model, find_site(model, "value_output", 0))
    assert torch.equal(after, before)
    rows = before[0, :, TOKEN] > 0
    assert torch.equal(others[~rows], seen[~rows])
    assert (others[rows] != seen[rows]).all()  # every number of every head


@fused
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_head_is_that_head(name, model, part):
    count = HEADS if part == "query" else SHARED[name]
    before, seen = attention(model)
    for head in range(count):
        after, others = attention(model, find_site(model, f"head_{part}_output", 0, head))
        mine = torch.arange(HEADS) // (HEADS // count) == head
        changed = (others != seen) if part == "value" else (after != before).transpose(0, 1)
        assert torch.equal(changed.any(-1).any(0), mine)
        assert torch.equal(after, before) is (part == "value")
    with pytest.raises(pyreft.ReftError, match=f"has the heads 0 to {count - 1}, got {count}"):
        find_site(model, f"head_{part}_output", 0, count)


@fused
def test_the_parts_make_up_the_projection_and_the_heads_a_part(name, model):
    found = []
    for part in ("query", "key", "value"):
        site = find_site(model, f"{part}_output", 0)
        its = indices(model, site)
        assert len(its) == site.width
        count = HEADS if part == "query" else SHARED[name]
        heads = [find_site(model, f"head_{part}_output", 0, head) for head in range(count)]
        assert all(head.columns.groups == 1 for head in heads)
        assert torch.equal(torch.cat([indices(model, head) for head in heads]), its)
        found.append(its)
    assert torch.cat(found).sort().values.tolist() == list(range(width_of(model.get_submodule(site.path))))


def test_lightning_attention_of_minimax():
    """It has no probabilities: a query of a token is nothing to others, a value is seen in its own head's columns."""
    layers = ["linear_attention", "full_attention"]
    model = causal(
        "MiniMax", "minimax", num_hidden_layers=2, layer_types=layers, head_dim=8, num_local_experts=2
    ).make()
    site = find_site(model, "query_output", 0)
    assert (site.path, site.columns) == ("model.layers.0.self_attn.qkv_proj", Columns(0, 8, 4))
    module = model.get_submodule("model.layers.0.self_attn")
    x = torch.randn(1, 6, 32)
    given = {"position_embeddings": None, "attention_mask": None}
    seen = []
    module.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].view(6, HEADS, WIDTH)))

    def edited(head, part):
        columns = find_site(model, f"head_{part}_output", 0, head).columns
        before = len(seen)
        with module.qkv_proj.register_forward_hook(
            lambda module, args, output: columns.put(output, -2 * columns.take(output))
        ):
            module(x, **given)
        return seen[before]

    with torch.no_grad():
        module(x, **given)
        for head in range(HEADS):
            for part in ("query", "key", "value"):
                changed = (edited(head, part) != seen[0]).any(-1).any(0)
                assert changed.tolist() == [number == head for number in range(HEADS)]
    assert find_site(model, "query_output", 1).path == "model.layers.1.self_attn.q_proj"


# -- what is not known ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One of somebody's own, with a fused projection under some name."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads = 4
        self.add_module(fused, nn.Linear(32, 96))
        self.dense = nn.Linear(32, 32)


def with_attention(attention):
    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn = attention
    return model


@pytest.mark.parametrize("fused", ["query_key_value", "wqkv", "qkv_proj"])
def test_a_layout_that_is_not_known_is_not_guessed(fused):
    model = with_attention(Attention(fused))
    for component, head in (("query_output", None), ("head_value_output", 1)):
        with pytest.raises(pyreft.ReftError) as caught:
            find_site(model, component, 0, head)
        assert str(caught.value) == (
            f"component: {component!r} has no columns that are known in 'model.layers.0.self_attn.{fused}': how "
            f"Attention takes queries, keys and values apart is not. Edit all of it by its path, "
            f"'model.layers.0.self_attn.{fused}.output'."
        )


def test_a_class_of_that_name_from_elsewhere_is_not_that_class():
    elsewhere = type("BloomAttention", (Attention,), {})
    with pytest.raises(pyreft.ReftError, match="how BloomAttention takes queries, keys and values apart is not"):
        find_site(with_attention(elsewhere("query_key_value")), "value_output", 0)
    lora = peft.get_peft_model(MAKE["Bloom"](), peft.LoraConfig(target_modules=["query_key_value"])).get_base_model()
    assert find_site(lora, "value_output", 0) == find_site(MAKE["Bloom"](), "value_output", 0)
    bloom = MAKE["Bloom"]()
    bloom.transformer.h[0].self_attention.__class__ = type("Sharded", (BloomAttention,), {})
    assert find_site(bloom, "value_output", 0).columns == Columns(16, 24, 4)


def test_keys_and_values_that_no_cache_holds():
    model = MAKE["DeepSeek-V3"]()
    for component in ("key_output", "value_output"):
        with pytest.raises(pyreft.ReftError) as caught:
            find_site(model, component, 1)
        assert str(caught.value) == (
            f"component: {component!r} cannot be edited in 'model.layers.1.self_attn.kv_b_proj': the cache holds what "
            "it reads, of which it makes keys and values anew at each step. Edit that, as "
            "'model.layers.1.self_attn.kv_a_layernorm.output', or 'block_output', with the formula 'loreft' or others."
        )
    path = "model.layers.1.self_attn.kv_a_layernorm.output"
    config = pyreft.ReftConfig(layers=[1], component=path, positions="l2")
    adapted = shaken(pyreft.get_reft_model(MAKE["DeepSeek-V3"](), config))
    ids = torch.randint(3, 90, (2, 7))
    found = [adapted.generate(input_ids=ids, use_cache=use, **GREEDY) for use in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(adapted(ids).logits, model(ids).logits)
    indexed = causal("", "deepseek_v32", **DEEPSEEK).make()
    with pytest.raises(pyreft.ReftError, match=r"'key_output' cannot be edited in .*kv_b_proj"):  # not the indexer's
        find_site(indexed, "key_output", 1)


# -- columns in groups ----------------------------------------------------------------------------------------------


def test_columns_in_groups():
    h = torch.arange(24.0).view(2, 12)
    columns = Columns(1, 3, groups=3)
    assert columns.take(h)[0].tolist() == [1, 2, 5, 6, 9, 10]
    new = columns.put(h, -columns.take(h))
    assert new[0].tolist() == [0, -1, -2, 3, 4, -5, -6, 7, 8, -9, -10, 11]
    assert torch.equal(h, torch.arange(24.0).view(2, 12))
    one = Columns(4, 6)
    assert one.take(h).data_ptr() == h[:, 4:].data_ptr()  # a view
    assert one.put(h, torch.zeros(2, 2))[0].tolist() == [0, 1, 2, 3, 0, 0, 6, 7, 8, 9, 10, 11]
    assert columns.take(h[:0]).shape == (0, 6)
    assert columns.put(h[:0], columns.take(h[:0])).shape == (0, 12)


@pytest.mark.parametrize("name", ALTERNATING)
def test_the_config_as_it_is(name, model, tmp_path):
    """Attached, trained, generated with and without a cache, saved and loaded."""
    base = MAKE[name]()
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig())
    ids = torch.randint(3, 90, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 5, -100)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    shaken(adapted)
    found = [adapted.generate(input_ids=ids, use_cache=use, **GREEDY) for use in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], base.generate(input_ids=ids, **GREEDY))
    adapted.save_pretrained(tmp_path)
    again = MAKE[name]()
    again.set_attn_implementation("eager")
    again = peft.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(again(ids).logits, adapted(ids).logits)
