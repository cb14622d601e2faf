"""Networks of one's own, without blocks, norms or a config: places by their paths alone."""

import peft
import pytest
import torch
from torch import nn
from transformers import XLMConfig, XLMModel

import pyreft
from conftest import shaken
from pyreft.describe import describe
from pyreft.places.components import find_site

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu, self.drop, self.b = nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 2)
        self.parts = nn.ModuleDict({"first": nn.Identity()})

    def forward(self, x):
        return self.b(self.drop(self.relu(self.a(x))))


class Residual(nn.Module):
    """A block without a norm."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x):
        return x + self.parts(x)


def sequential():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def listed():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    return Listed()


def encoder():
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 24, batch_first=True, dropout=0.0), nn.Linear(8, 3))


PLACES = [
    (Net, "a.output", 16),
    (Net, "a.input", 8),
    (Net, "relu.output", 16),
    (Net, "drop.input", 16),
    (Net, "b.output", 2),
    (sequential, "0.output", 16),
    (sequential, "1.output", 16),
    (sequential, "2.input", 16),
    (listed, "blocks[1].output", 8),
    (listed, "blocks[1].input", 8),
    (listed, "blocks.2.parts.output", 8),
    (listed, "blocks[0].parts[1].output", 24),
    (encoder, "0.output", 8),
    (encoder, "0.linear1.output", 24),
]


def made(make):
    torch.manual_seed(0)
    return make().eval()


def config(component, **changes):
    return pyreft.ReftConfig(
        representations={"component": component, "low_rank_dimension": 2, "positions": "l2"} | changes
    )


@pytest.mark.parametrize(("make", "component", "width"), PLACES)
def test_a_place_by_its_path(make, component, width, tmp_path):
    assert find_site(made(make), component).width == width
    with torch.no_grad():
        plain = made(make)(X)
        adapted = shaken(peft.get_peft_model(made(make), config(component)))
        edited = adapted(X)
        assert torch.equal(edited[:, :3], plain[:, :3]) or make is encoder  # whose attention is not causal
        assert not torch.equal(edited[:, 3:], plain[:, 3:])
        with adapted.disable_adapter():
            assert torch.equal(adapted(X), plain)
        adapted.save_pretrained(tmp_path)
        for loader in (peft.PeftModel, pyreft.ReftModel):
            assert torch.equal(loader.from_pretrained(made(make), tmp_path)(X), edited)
    adapted.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_of_the_original(tmp_path):
    adapted = shaken(pyreft.get_reft_model(made(Net), config("a.output", positions="all")))
    adapted.save(tmp_path)
    loaded = pyreft.ReftModel.load(tmp_path, made(Net))
    with torch.no_grad():
        expected = adapted(X)
        assert torch.equal(loaded(X), expected)
        shaken(loaded).load_intervention(tmp_path)
        assert torch.equal(loaded(X), expected)
    assert adapted.count_parameters() == 2 * 16 * 2 + 2
    assert describe(tmp_path)["places"][0]["component"] == "a.output"


def test_a_second_adapter(tmp_path):
    adapted = peft.get_peft_model(made(Net), config("a.output", positions="all"), adapter_name="one")
    shaken(adapted).save_pretrained(tmp_path)
    adapted.add_adapter("two", adapted.peft_config["one"])
    adapted.load_adapter(tmp_path / "one", "three")
    with torch.no_grad():
        edited = adapted(X)
        adapted.set_adapter("three")
        assert torch.equal(adapted(X), edited)
        adapted.set_adapter("two")
        assert not torch.equal(adapted(X), edited)
    assert adapted.peft_config["two"].base_model_shape["num_hidden_layers"] is None


def test_an_adapter_for_another_network_is_refused(tmp_path):
    peft.get_peft_model(made(Net), config("a.output")).save_pretrained(tmp_path)
    with pytest.raises(pyreft.ReftError, match="model_type 'Sequential' instead of 'Net'"):
        peft.PeftModel.from_pretrained(sequential(), tmp_path)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"layers": "all"}, "No list of blocks was found in Net. Give the place to edit by its path"),
        ({"representations": {"layer": 0}}, "No list of blocks was found in Net."),
        ({"representations": {"component": "parts.output"}}, "'parts' holds modules .* as in parts.first.output"),
        ({"representations": {"component": "c.output"}}, "expected one of block_input, .* or a module's path"),
    ],
)
def test_what_is_missing_is_told(wanted, message):
    net = made(Net)
    with pytest.raises(pyreft.ReftError, match=message):
        peft.get_peft_model(net, pyreft.ReftConfig(**wanted))
    assert net.state_dict().keys() == Net().state_dict().keys()


def test_a_width_that_nothing_tells():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.eye(8))

        def forward(self, x):
            return x @ self.own

    net = nn.Sequential(Weighted())
    with pytest.raises(pyreft.ReftError, match=r"The width of the states at '0' is neither .* Edit a linear layer"):
        peft.get_peft_model(net, config("0.output"))


def test_a_module_that_is_never_called_is_refused():
    """Only its weights are read, and an edit there would be none."""
    base = encoder()
    for place in ("0.self_attn.out_proj.output", "0.self_attn.out_proj.input"):
        with pytest.raises(pyreft.ReftError, match=r"reads the weights of '0\.self_attn\.out_proj' and never calls it"):
            peft.get_peft_model(base, pyreft.ReftConfig(representations={"component": place, "positions": "all"}))
    plain = base.eval()(X)
    config = pyreft.ReftConfig(representations={"component": "0.self_attn.output", "positions": "all"})
    assert not torch.allclose(shaken(peft.get_peft_model(base, config)).eval()(X), plain, atol=1e-3)


def test_blocks_with_norms_between_them_are_blocks():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))

        def forward(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = norm(layer(x))
            return x

    config = pyreft.ReftConfig(layers=[1], component="block_output", intervention="bias", positions="all")
    adapted = pyreft.get_reft_model(Network(), config)
    assert "layers.1.reft_output" in dict(adapted.get_base_model().named_modules())


def test_lists_of_parts_are_no_blocks():
    """XLM keeps its attentions, MLPs and norms in lists of their own: what is called a block there is an MLP."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "dropout": 0, "attention_dropout": 0}
    model = XLMModel(XLMConfig(**sizes)).eval()
    with pytest.raises(pyreft.ReftError, match=r"XLMModel has no blocks, but lists of their parts, such as 'ffns'"):
        pyreft.get_reft_model(model, pyreft.ReftConfig(layers=[1], component="block_output"))
    place = {"component": "layer_norm2[1].output", "intervention": "bias", "positions": "l1"}
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place)).eval()
    (edit,) = adapted.interventions.values()
    edit.bias.data += 1
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = adapted(ids, output_hidden_states=True).hidden_states[2]
        with adapted.disable_adapter():
            plain = adapted(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states - plain, torch.tensor([0.0, 0.0, 1.0])[None, :, None].expand(1, 3, 16))
