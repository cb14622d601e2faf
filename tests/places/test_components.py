"""Where components are: tables over architectures, and what the errors say."""

import contextlib

import peft
import pytest
from torch import nn

import pyreft
from architectures import ARCHITECTURES
from conftest import tiny_llama
from pyreft.places.components import COMPONENTS, Site, find_site, number_of_layers
from pyreft.places.lookup import Columns
from pyreft.places.structure import find_blocks, hidden_width, stack_module

MAKE = {one.name: one.make for one in ARCHITECTURES}


@pytest.mark.parametrize(
    ("name", "component", "path", "side", "width", "columns"),
    [
        ("Llama", "block_input", "model.layers.1", "input", 32, None),
        ("Llama", "block_output", "model.layers.1", "output", 32, None),
        ("Llama", "mlp_input", "model.layers.1.mlp", "input", 32, None),
        ("Llama", "mlp_activation", "model.layers.1.mlp.act_fn", "output", 64, None),
        ("Llama", "mlp_output", "model.layers.1.mlp", "output", 32, None),
        ("Llama", "attention_input", "model.layers.1.self_attn", "input", 32, None),
        ("Llama", "attention_value_output", "model.layers.1.self_attn.o_proj", "input", 32, None),
        ("Llama", "attention_output", "model.layers.1.self_attn", "output", 32, None),
        ("Llama", "query_output", "model.layers.1.self_attn.q_proj", "output", 32, None),
        ("Llama", "key_output", "model.layers.1.self_attn.k_proj", "output", 16, None),
        ("Llama", "value_output", "model.layers.1.self_attn.v_proj", "output", 16, None),
        ("Qwen3", "attention_value_output", "model.layers.1.self_attn.o_proj", "input", 64, None),
        ("GPT-2", "mlp_activation", "transformer.h.1.mlp.act", "output", 64, None),
        ("GPT-2", "attention_value_output", "transformer.h.1.attn.c_proj", "input", 32, None),
        ("GPT-2", "query_output", "transformer.h.1.attn.c_attn", "output", 32, (0, 32)),
        ("GPT-2", "value_output", "transformer.h.1.attn.c_attn", "output", 32, (64, 96)),
        ("GPT-BigCode", "key_output", "transformer.h.1.attn.c_attn", "output", 8, (32, 40)),
        ("Phi-3", "value_output", "model.layers.1.self_attn.qkv_proj", "output", 16, (48, 64)),
        ("MPT", "key_output", "transformer.blocks.1.attn.Wqkv", "output", 32, (32, 64)),
        ("ModernBERT", "attention_value_output", "model.layers.1.attn.Wo", "input", 32, None),
        ("ModernBERT", "key_output", "model.layers.1.attn.Wqkv", "output", 32, (32, 64)),
        ("GPT-NeoX", "attention_value_output", "gpt_neox.layers.1.attention.dense", "input", 32, None),
        ("GPT-NeoX", "value_output", "gpt_neox.layers.1.attention.query_key_value", "output", 32, (16, 24, 4)),
        ("Falcon", "key_output", "transformer.h.1.self_attention.query_key_value", "output", 8, (32, 40)),
        ("Falcon 40B", "query_output", "transformer.h.1.self_attention.query_key_value", "output", 32, (0, 16, 2)),
        ("CodeGen", "value_output", "transformer.h.1.attn.qkv_proj", "output", 32, (8, 16, 4)),
        ("DeepSeek-V3", "query_output", "model.layers.1.self_attn.q_b_proj", "output", 48, None),
        ("OPT", "mlp_input", "model.decoder.layers.1.fc1", "input", 32, None),
        ("OPT", "mlp_activation", "model.decoder.layers.1.activation_fn", "output", 64, None),
        ("OPT", "mlp_output", "model.decoder.layers.1.fc2", "output", 32, None),
        ("BERT", "mlp_input", "bert.encoder.layer.1.intermediate", "input", 32, None),
        ("BERT", "mlp_output", "bert.encoder.layer.1.output", "output", 32, None),
        ("BERT", "attention_output", "bert.encoder.layer.1.attention", "output", 32, None),
        ("BERT", "query_output", "bert.encoder.layer.1.attention.self.query", "output", 32, None),
        ("Mixtral", "mlp_output", "model.layers.1.mlp", "output", 32, None),
        ("Mamba", "block_output", "backbone.layers.1", "output", 32, None),
        ("Jamba", "attention_output", "model.layers.1.self_attn", "output", 32, None),
        ("LLaVA", "mlp_output", "model.language_model.layers.1.mlp", "output", 32, None),
        # an explicit path
        ("Llama", "model.layers[2].mlp.act_fn.output", "model.layers.2.mlp.act_fn", "output", 64, None),
        ("Llama", "model.layers[2].mlp.gate_proj.output", "model.layers.2.mlp.gate_proj", "output", 64, None),
        ("Llama", "model.norm.output", "model.norm", "output", 32, None),
        (
            "ELECTRA",
            "electra.embeddings.word_embeddings.output",
            "electra.embeddings.word_embeddings",
            "output",
            16,
            None,
        ),
        (
            "LLaVA",
            "model.vision_tower.encoder.layers[4].output",
            "model.vision_tower.encoder.layers.4",
            "output",
            24,
            None,
        ),
        ("Qwen2-VL", "model.visual.blocks[4].output", "model.visual.blocks.4", "output", 24, None),
    ],
)
def test_components(name, component, path, side, width, columns):
    layer = None if "." in component else 1
    assert find_site(MAKE[name](), component, layer) == Site(path, side, width, columns and Columns(*columns))


@pytest.mark.parametrize(
    ("name", "component", "head", "path", "columns"),
    [
        ("Llama", "head_attention_value_output", 3, "model.layers.0.self_attn.o_proj", (24, 32)),
        ("Llama", "head_query_output", 1, "model.layers.0.self_attn.q_proj", (8, 16)),
        ("Llama", "head_key_output", 1, "model.layers.0.self_attn.k_proj", (8, 16)),
        ("Qwen3", "head_query_output", 3, "model.layers.0.self_attn.q_proj", (48, 64)),
        ("Qwen3", "head_value_output", 1, "model.layers.0.self_attn.v_proj", (16, 32)),
        ("GPT-2", "head_attention_value_output", 2, "transformer.h.0.attn.c_proj", (16, 24)),
        ("GPT-2", "head_key_output", 2, "transformer.h.0.attn.c_attn", (48, 56)),
        ("GPT-BigCode", "head_value_output", 0, "transformer.h.0.attn.c_attn", (40, 48)),
        ("GPT-NeoX", "head_value_output", 1, "gpt_neox.layers.0.attention.query_key_value", (40, 48)),
        ("Falcon 40B", "head_query_output", 3, "transformer.h.0.self_attention.query_key_value", (40, 48)),
        ("Falcon 40B", "head_key_output", 1, "transformer.h.0.self_attention.query_key_value", (48, 56)),
        ("Phi-3", "head_value_output", 1, "model.layers.0.self_attn.qkv_proj", (56, 64)),
        ("DeepSeek-V3", "head_query_output", 1, "model.layers.0.self_attn.q_b_proj", (12, 24)),
        ("DeepSeek-V3", "head_attention_value_output", 1, "model.layers.0.self_attn.o_proj", (8, 16)),
        ("T5", "decoder.head_key_output", 3, "decoder.block.0.layer.0.SelfAttention.k", (24, 32)),
    ],
)
def test_heads(name, component, head, path, columns):
    site = find_site(MAKE[name](), component, 0, head)
    assert (site.path, site.columns, site.width) == (path, Columns(*columns), columns[1] - columns[0])


@pytest.mark.parametrize(
    ("name", "component", "path", "stack"),
    [
        ("T5", "block_output", "encoder.block.1", "encoder"),
        ("T5", "decoder.block_output", "decoder.block.1", "decoder"),
        ("T5", "mlp_output", "encoder.block.1.layer.1.DenseReluDense", "encoder"),
        ("T5", "decoder.mlp_output", "decoder.block.1.layer.2.DenseReluDense", "decoder"),
        ("T5", "decoder.attention_output", "decoder.block.1.layer.0.SelfAttention", "decoder"),
        ("T5", "decoder.cross_attention_output", "decoder.block.1.layer.1.EncDecAttention", "decoder"),
        ("BART", "encoder.attention_output", "model.encoder.layers.1.self_attn", "encoder"),
        ("BART", "decoder.cross_attention_output", "model.decoder.layers.1.encoder_attn", "decoder"),
        ("Whisper", "mlp_input", "model.encoder.layers.1.fc1", "encoder"),
        ("BART", "model.encoder.layers[2].fc1.input", "model.encoder.layers.2.fc1", "encoder"),
        ("BART", "model.decoder.layers[0].output", "model.decoder.layers.0", "decoder"),
    ],
)
def test_stacks(name, component, path, stack):
    site = find_site(MAKE[name](), component, 1)
    assert (site.path, site.stack, site.width) == (path, stack, 32)


def test_the_stacks_of_a_model():
    model = MAKE["BART"]()
    assert number_of_layers(model) == number_of_layers(model, "encoder.mlp_output") == 3
    assert number_of_layers(model, "decoder.block_output") == 2
    assert stack_module(model, "encoder") is model.model.encoder
    assert stack_module(model, "decoder") is model.model.decoder
    assert stack_module(model) is model


@pytest.mark.parametrize(
    ("name", "component", "layer", "head", "message"),
    [
        ("Llama", "block_outptu", 0, None, "Did you mean 'block_output'?"),
        ("Llama", "block_output", 3, None, "layer: this model has the layers 0 to 2, got 3."),
        ("Llama", "block_output", None, None, "layer: this model has the layers 0 to 2, got None."),
        ("T5", "decoder.block_output", 2, None, "layer: the decoder of this model has the layers 0 to 1, got 2."),
        ("T5", "cross_attention_output", 0, None, "'cross_attention_output' was not found in layer 0 of T5For"),
        (
            "Llama",
            "decoder.block_output",
            0,
            None,
            "LlamaForCausalLM is no encoder-decoder model; leave out the prefix",
        ),
        ("Mamba", "attention_output", 1, None, "in layer 1 of MambaForCausalLM, whose parts are norm, mixer. Give a"),
        ("Mixtral", "mlp_activation", 0, None, "Give a module's path, such as 'model.layers.0.<part>.output'."),
        ("Llama", "head_query_output", 0, None, "head: 'head_query_output' needs the number of a head."),
        ("Llama", "head_query_output", 0, 4, "head: 'head_query_output' has the heads 0 to 3, got 4."),
        ("Llama", "head_key_output", 0, 2, "head: 'head_key_output' has the heads 0 to 1, got 2."),
        ("Llama", "query_output", 0, 1, "head: 'query_output' is no single head."),
        ("Llama", "model.layers[9].output", None, None, "component: expected one of block_input, block_output,"),
        ("Llama", "model.layers[0]", None, None, "or a module's path with .input or .output, got 'model.layers[0]'"),
    ],
)
def test_errors(name, component, layer, head, message):
    with pytest.raises(pyreft.ReftError) as caught:
        find_site(MAKE[name](), component, layer, head)
    assert message in str(caught.value)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))


class Plain(nn.Module):
    """A network that transformers knows nothing of, whose longest list is not that of its blocks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
        self.trunk = nn.ModuleList(Block(12) for _ in range(3))


def test_a_network_without_a_config():
    model = Plain()
    assert find_blocks(model) == ("trunk", model.trunk)
    assert hidden_width(model) == 12
    assert find_site(model, "mlp_output", 2) == Site("trunk.2.mlp", "output", 12)
    with pytest.raises(pyreft.ReftError, match="No list of blocks was found in Linear"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(pyreft.ReftError, match="neither in a norm there nor in a config"):
        hidden_width(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])))


def test_blocks_with_lists_of_experts_longer_than_their_own():
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
    model.heads = nn.ModuleList(nn.Linear(32, 4096) for _ in range(9))
    assert find_blocks(model)[0] == "model.layers"


def test_widths_of_layers_that_another_adapter_wraps():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "o_proj"])).get_base_model()
    assert find_site(model, "query_output", 0) == Site("model.layers.0.self_attn.q_proj", "output", 32)
    assert find_site(model, "head_attention_value_output", 0, 1).columns == Columns(8, 16)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "BERT", "Mixtral"])
def test_an_adapted_model_is_read_as_it_was(name):
    def sites(model):
        found = {}
        for component in COMPONENTS:
            with contextlib.suppress(pyreft.ReftError):
                found[component] = find_site(model, component, 0, 0 if component.startswith("head_") else None)
        return found

    model = MAKE[name]()
    before = sites(model)
    whole = {component for component, site in before.items() if site.columns is None}
    places = [{"component": component, "layer": 0, "low_rank_dimension": 2} for component in sorted(whole)]
    peft.get_peft_model(model, pyreft.ReftConfig(representations=places), adapter_name="mlp")
    assert sites(model) == before
