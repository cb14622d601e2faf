"""What a base model does only from some column, position or length on, and rows that fit where batches do not."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import ARCHITECTURES
from conftest import CACHE
from pyreft.reach import Reach
from pyreft.reach.layers import SkipLayers
from pyreft.reach.prefixes import SkipPrefixes
from reaching import adapt, assert_exact, assert_same, batch_of, loss_and_gradients, rows_of

SIDES = ["left", "right"]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100, "beta_fast": 32.0,
    "llama_4_scaling_beta": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def made(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval().double()


class FromAColumnOn(nn.Embedding):
    """Adds to the embeddings from the 80th column on."""

    def forward(self, ids):
        found = super().forward(ids)
        return torch.cat((found[:, :80], found[:, 80:] + 1), dim=1)


class InLongForwards(nn.Linear):
    """Another projection in forwards over more than 60 tokens."""

    def forward(self, h):
        return super().forward(h) * (2 if h.shape[1] > 60 else 1)


class NotInShortForwards(nn.Linear):
    """Another projection in forwards over a few tokens."""

    def forward(self, h):
        return super().forward(h) * (2 if h.shape[1] < 4 else 1)


def with_module(path, kind):
    base = made("llama")
    plain = base.get_submodule(path)
    plain.__class__ = kind
    return base


MODELS = {
    "query scaling by position": lambda: made("ministral3", head_dim=8, rope_parameters=YARN),
    "keys selected above a length": lambda: made("doge", keep_window_size=16),
    "a sliding window": lambda: made("mistral", sliding_window=40),
    "angles by length": lambda: made("llama", rope_parameters=DYNAMIC, max_position_embeddings=60),
    "embeddings by column": lambda: with_module("model.embed_tokens", FromAColumnOn),
    "a projection by length": lambda: with_module("model.layers.0.mlp.up_proj", InLongForwards),
    "a projection by shortness": lambda: with_module("model.layers.2.self_attn.o_proj", NotInShortForwards),
    "a head by length": lambda: with_module("lm_head", InLongForwards),
}


@pytest.mark.parametrize("first", [12, 120], ids="first {}".format)
@pytest.mark.parametrize("layers", [[0], [1, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_begins_at_some_length(name, layers, first):
    """Whatever came first: short rows, rows beyond the threshold, and both in one batch."""
    adapted = adapt(MODELS[name](), layers=layers)
    reach = Reach(adapted)
    for lengths in ((first, 9), (14, 9), (65, 12), (155, 60), (30, 20), (12, 150), (20, 10)):
        for side, answers in (("left", 4), ("right", [2, 8]), ("left", 1)):
            batch = batch_of(rows_of(*lengths), side, answers)
            expected = loss_and_gradients(adapted, adapted, batch)
            for _ in range(2):
                assert_same(loss_and_gradients(reach, adapted, batch), expected, 1e-8)


def test_few_sizes_are_tried():
    """Over batches that grow by a token each, a trial comes with half as many columns again."""
    adapted = adapt(made("llama"), layers=[0])
    reach, tried = Reach(adapted), []
    reach(**batch_of(rows_of(9, 8), "left"))
    probe = reach._choice._probe
    plain = probe._apart_in_prefixes
    probe._apart_in_prefixes = lambda way, ordinary, batches: (
        tried.append(batches[0]["input_ids"].shape[1]),
        plain(way, ordinary, batches),
    )[1]
    for length in range(10, 140):
        reach(**batch_of(rows_of(length, 8), "left"))
    assert tried == [24, 32, 48, 64, 96, 128, 192]


def test_a_trial_is_no_step():
    adapted = adapt(made("llama"), layers=[0])
    reach = Reach(adapted)
    batch = batch_of(rows_of(100, 8), "left")
    torch.manual_seed(3)
    reach(**batch)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert (reach._way.tokens, len(reach.store)) == (200, 2 + 2)


def long_and_short(size, side="left"):
    """A long prompt with a short answer, and a short one with a long answer: each fits, both together do not."""
    return batch_of(rows_of(size, size - 3), side, [6, size - 9])


WITH_A_TABLE = ["GPT-2", "GPT-Neo", "GPT-J", "GPT-BigCode", "OPT", "MPT", "Falcon", "Llama", "Gemma 3", "Phi"]
IN_FLOAT32 = {"GPT-Neo": 1e-5, "GPT-J": 1e-5}  # attention scores there, whatever the weights


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WITH_A_TABLE)
@pytest.mark.parametrize("layers", [[0], [2]], ids=str)
def test_prefix_and_window_beyond_the_context(name, side, layers):
    adapted = adapt(next(one for one in ARCHITECTURES if one.name == name).make().double(), layers=layers)
    reach, tolerance = Reach(adapted), IN_FLOAT32.get(name, 1e-8)
    reach(**batch_of(rows_of(12, 9), side))
    for size in (120, 127, 128):
        assert_exact(reach, adapted, long_and_short(size, side), tolerance)
        assert type(reach._way) is SkipPrefixes
    assert_exact(Reach(adapted), adapted, long_and_short(128, side), tolerance)


class FixedBias(nn.Module):
    """A bias for as many columns as its buffer has, as in many models of their own; it does not say so anywhere."""

    def __init__(self, attention, columns):
        super().__init__()
        self.attention = attention
        self.register_buffer("bias", -0.1 * torch.arange(columns, dtype=torch.float64))

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length(self.attention.layer_idx)
        end = past + hidden_states.shape[1]
        columns = torch.arange(hidden_states.shape[1])[:, None] + past - torch.arange(end)
        bias = self.bias[columns.clamp(min=0)]
        seen = torch.zeros_like(bias).masked_fill(columns < 0, -torch.inf)
        mask = seen if attention_mask is None else torch.zeros_like(bias).where(attention_mask, -torch.inf)
        return self.attention(hidden_states, attention_mask=mask + bias, **kwargs)


def test_a_bias_of_fixed_width_that_no_config_tells():
    base = made("llama", max_position_embeddings=4096)
    for layer in base.model.layers:
        layer.self_attn = FixedBias(layer.self_attn, 100)
    adapted = adapt(base)
    reach = Reach(adapted)
    for size in (30, 96, 100, 90):
        assert_exact(reach, adapted, long_and_short(size), tolerance=1e-8)
        assert type(reach._way) is SkipPrefixes
    with pytest.raises(IndexError):
        adapted(**long_and_short(101))
    with pytest.raises(IndexError):
        reach(**long_and_short(101))


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT"])
@pytest.mark.parametrize("side", SIDES)
def test_encoders_at_the_end_of_their_table(name, side):
    adapted = adapt(next(one for one in ARCHITECTURES if one.name == name).make().double(), layers=[1])
    table = adapted.get_base_model().config.max_position_embeddings - (2 if name == "RoBERTa" else 0)
    reach = Reach(adapted)
    for lengths in ((9, 5), (table, 5), (table - 1, table), (1, 2)):
        batch = batch_of(rows_of(*lengths), side, 0) | {"labels": torch.tensor([0, 1])}
        assert_exact(reach, adapted, batch, tolerance=1e-9)
        assert type(reach._way) is SkipLayers


def test_positions_beyond_the_columns():
    """Given positions count as columns do: with them the model comes to where it computes something else."""
    adapted = adapt(MODELS["query scaling by position"](), layers=[0])
    reach = Reach(adapted)
    batch = batch_of(rows_of(12, 9), "left")
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for start in (0, 40, 95, 300):
        assert_exact(reach, adapted, batch | {"position_ids": counted + start}, tolerance=1e-8)


def test_given_positions_and_angles_by_length():
    adapted = adapt(MODELS["angles by length"](), layers=[0])
    reach = Reach(adapted)
    batch = batch_of(rows_of(12, 9), "left")
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for start in (0, 55, 10):
        moved = batch | {"position_ids": counted + start}
        assert_same(loss_and_gradients(reach, adapted, moved), loss_and_gradients(adapted, adapted, moved), 1e-8)
        assert (reach.why_not is None) is (start + 12 <= 60)
