"""LoRA at located tokens: against PEFT's LoRA, against hooks that write it out, and what is refused."""

import contextlib
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyreft
from architectures import ARCHITECTURES
from conftest import pad, shaken, tiny_llama
from pyreft.interventions import LoraIntervention
from pyreft.places.components import COMPONENTS, LINEAR, find_site, number_of_layers
from pyreft.reach import Reach
from pyreft.tuner.adapted import interventions_of
from reaching import assert_exact, batch_of, loss_and_gradients, rows_of

MAKE = {one.name: one.make for one in ARCHITECTURES}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def adapt(base, **config):
    config = {"intervention": "lora", "low_rank_dimension": 3, "positions": "l2"} | config
    return shaken(pyreft.get_reft_model(base, pyreft.ReftConfig(**config)))


def peft_lora(base, **config):
    """A LoRA of PEFT with large B, too."""
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": MODULES} | config)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    return adapted.eval()


def by_kind(names_and_values):
    """Gradients or weights of A and of B, in the order of the layers."""
    found = {"A": {}, "B": {}}
    for name, value in names_and_values:
        kind = "A" if ".lora_A." in name or ".A." in name else "B"
        found[kind][name.split(".lora_")[0].split(".reft_")[0].removeprefix("base_model.model.")] = value
    return found


def gradients(adapted, batch):
    loss, found = loss_and_gradients(adapted, adapted, batch)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    return loss, by_kind(zip(trained, found, strict=True))


# -- the formula --------------------------------------------------------------------------------------------------


def test_the_formula():
    edit = LoraIntervention(embed_dim=5, input_dim=7, low_rank_dimension=2, alpha=3)
    h, x = torch.randn(4, 5), torch.randn(4, 7)
    assert torch.equal(edit(h, x=x), h)  # B begins at zero
    torch.nn.init.normal_(edit.B.weight)
    torch.testing.assert_close(edit(h, x=x), h + 3 / 2 * x @ edit.A.weight.T @ edit.B.weight.T)
    only = torch.tensor([[True, False]] * 4)
    expected = h + 3 / 2 * (x @ edit.A.weight[:1].T) @ edit.B.weight[:, :1].T
    torch.testing.assert_close(edit(h, x=x, subspaces=only), expected)


def test_it_begins_as_pefts():
    torch.manual_seed(3)
    ours = LoraIntervention(embed_dim=5, input_dim=70, low_rank_dimension=20)
    assert ours.scale == 2
    assert ours.A.weight.abs().max() <= 70**-0.5
    assert abs(ours.A.weight.std().item() * (3 * 70) ** 0.5 - 1) < 0.05  # uniform


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_rank_dimension": 0}, "low_rank_dimension: expected 1 or more, got 0"),
        *(({"alpha": alpha}, "alpha: expected a number above 0") for alpha in (0, -1, True, "2", float("nan"))),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(pyreft.ReftError, match=message):
        LoraIntervention(embed_dim=5, input_dim=7, **{"low_rank_dimension": 2} | settings)


# -- against PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [MODULES, ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rslora", [True, False])
def test_at_every_token_it_is_pefts_lora(tmp_path, monkeypatch, modules, rslora):
    theirs = peft_lora(tiny_llama(), target_modules=modules, use_rslora=rslora, alpha_pattern={"layers.1.*v_proj": 5})
    theirs.save_pretrained(tmp_path)
    ours = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig.from_lora(tmp_path, positions="all")).eval()
    ours, theirs = ours.double(), theirs.double()  # and so are the edits, else in float32:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for side in ("left", "right"):
        batch = batch_of(rows_of(11, 7, 8), side)
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            found, expected = (model(**batch).logits[mask] for model in (ours, theirs))
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
        (loss, found), (expected_loss, expected) = gradients(ours, batch), gradients(theirs, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
        for kind in "AB":
            assert found[kind].keys() == expected[kind].keys()
            for path, gradient in expected[kind].items():
                assert (found[kind][path] - gradient).norm() <= 1e-9 * gradient.norm()
    ids, mask = pad(rows_of(9, 4), "left")
    prompt = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    assert torch.equal(ours.generate(**prompt), theirs.generate(**prompt))


def test_names_of_components_are_pefts_modules():
    ours = adapt(tiny_llama(), component=list(LINEAR), positions="all", intervention_kwargs={"alpha": 7})
    theirs = peft_lora(tiny_llama())
    weights = by_kind((name, p) for name, p in ours.named_parameters() if "reft_" in name)
    with torch.no_grad():
        for kind, found in by_kind((name, p) for name, p in theirs.named_parameters() if "lora_" in name).items():
            assert found.keys() == weights[kind].keys()
            for path, parameter in found.items():
                parameter.copy_(weights[kind][path])
    ids = torch.randint(3, 96, (2, 9))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


HEADS = torch.arange(96).view(4, 3, 8)  # of which each has its q, k and v
SHARED = torch.arange(64).view(2, 4, 8)  # of two q, a k and a v each


@pytest.mark.parametrize(
    ("name", "component", "rows"),
    [
        ("GPT-NeoX", "query_output", HEADS[:, 0]),
        ("GPT-NeoX", "value_output", HEADS[:, 2]),
        ("Bloom", "key_output", HEADS[:, 1]),
        ("Falcon", "query_output", torch.arange(32)),
        ("Falcon 40B", "query_output", SHARED[:, :2]),
        ("Falcon 40B", "key_output", SHARED[:, 2]),
        ("CodeGen", "value_output", HEADS[:, 1]),  # q, v, k
    ],
)
def test_columns_that_alternate_as_a_lora_of_pefts(name, component, rows):
    ours = adapt(MAKE[name](), component=component, positions="all", intervention_kwargs={"alpha": 7})
    edits = list(interventions_of(ours, "default").values())
    module = "qkv_proj" if name == "CodeGen" else "query_key_value"
    theirs = peft_lora(MAKE[name](), target_modules=[module])
    pairs = [layer for layer in theirs.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    with torch.no_grad():
        for pair, edit in zip(pairs, edits, strict=True):
            pair.lora_A["default"].weight.copy_(edit.A.weight)
            pair.lora_B["default"].weight.zero_()[rows.flatten()] = edit.B.weight
    ids = torch.randint(3, 90, (2, 9))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=5e-5)
    assert not torch.allclose(ours(ids).logits, MAKE[name]()(ids).logits, atol=1e-2)


FUSED = [("GPT-2", "c_attn"), ("Phi-3", "gate_up_proj"), ("GPT-NeoX", "query_key_value"), ("CodeGen", "qkv_proj")]


@pytest.mark.parametrize(("name", "module"), FUSED)
def test_parts_of_a_fused_layer_as_a_lora_of_pefts(tmp_path, name, module):
    components = ["gate_output", "up_output"] if module == "gate_up_proj" else ["query_output", "value_output"]
    ours = adapt(MAKE[name](), component=components, positions="all")
    ours.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(MAKE[name](), tmp_path).eval()
    assert theirs.peft_config["default"].r == 6
    ids = torch.randint(3, 90, (2, 9))
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=5e-5)
    again = pyreft.get_reft_model(MAKE[name](), pyreft.ReftConfig.from_lora(tmp_path, positions="all")).eval()
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=1e-5, atol=5e-5)


def test_a_located_lora_is_nothing_that_peft_takes(tmp_path):
    ours = adapt(tiny_llama(), component=MODULES_AS_COMPONENTS, positions="f1+l3")
    ours.save_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["reft_positions"] == "f1+l3"
    for load in (
        lambda: peft.PeftModel.from_pretrained(tiny_llama(), tmp_path),
        lambda: peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True),
        lambda: tiny_llama().load_adapter(str(tmp_path)),
    ):
        with (
            pytest.warns(UserWarning, match="reft_positions"),
            pytest.raises(ValueError, match=r"acts at the tokens f1\+l3 alone.*pyreft.ReftConfig.from_lora"),
        ):
            load()
    again = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig.from_lora(tmp_path)).eval()
    ids = torch.randint(3, 96, (2, 9))
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert again.peft_config["default"].representations[0].positions == "f1+l3"
    again.save(tmp_path / "ours")
    assert torch.equal(pyreft.ReftModel.load(tmp_path / "ours", tiny_llama())(ids).logits, ours(ids).logits)


MODULES_AS_COMPONENTS = ["value_output", "down_output"]


def test_pefts_lora_of_ranks_by_layer(tmp_path):
    places = [
        {"layer": layer, "component": "value_output", "low_rank_dimension": rank, "intervention_kwargs": {"alpha": 5}}
        for layer, rank in ((0, 2), (1, 3), (2, 2))
    ]
    config = pyreft.ReftConfig(representations=places, intervention="lora", positions="all")
    ours = shaken(pyreft.get_reft_model(tiny_llama(), config))
    ours.save_lora(tmp_path)
    ids = torch.randint(3, 96, (2, 9))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intervention": "loreft", "component": "block_output"}, "intervention: only the formula 'lora' can be"),
        ({"positions": "f1+l1", "share_weights": False}, r"positions: a LoRA has one rule.*f1\+l1 \(prefix\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: a LoRA of edits alone is written"),
    ],
)
def test_what_is_no_lora_of_pefts(tmp_path, config, message):
    with pytest.raises(pyreft.ReftError, match=message):
        adapt(tiny_llama(), **config).save_lora(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def written(path, change):
    """A LoRA of PEFT with a change in its files."""
    peft_lora(tiny_llama(), target_modules=["v_proj"]).save_pretrained(path)
    config, weights = json.loads((path / "adapter_config.json").read_text()), path / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(config, tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, weights)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.update(use_dora=True), "use_dora: only LoRA as it is"),
        (lambda config, _: config.update(bias="all"), "bias: the base model's are trained"),
        (lambda config, _: config.update(modules_to_save=["lm_head"]), "modules_to_save: only LoRA as it is"),
        (lambda config, _: config.update(peft_type="IA3"), "expected a LoRA, got an adapter of the type 'IA3'"),
        (lambda config, _: config.pop("lora_alpha"), "lora_alpha: expected a number"),
        (lambda config, _: config.update(lora_alpha="much"), "lora_alpha: expected a number"),
        (lambda config, _: config.update(reft_positions=3), "reft_positions: expected text, got 3"),
        (lambda _, tensors: tensors.pop(KEY), r"v_proj: expected matrices A and B of one rank, got lora_B \[16, 3\]"),
        (lambda _, tensors: tensors.update({KEY: torch.zeros(2, 32)}), "expected matrices A and B of one rank"),
        (lambda _, tensors: tensors.update({KEY: torch.full((3, 32), torch.nan)}), "96 of 96 numbers are not finite"),
        (lambda _, tensors: tensors.update(more=torch.zeros(2, 2)), "expected pairs of matrices at linear layers"),
        (lambda _, tensors: tensors.clear(), "there are no tensors in it"),
    ],
)
def test_what_cannot_be_located(tmp_path, change, message):
    written(tmp_path, change)
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.ReftConfig.from_lora(tmp_path, positions="l1")


def test_a_lora_says_nothing_of_tokens(tmp_path):
    written(tmp_path, lambda config, tensors: None)
    with pytest.raises(
        pyreft.ReftError, match=r"positions: .*expected a rule for the tokens that the LoRA was trained"
    ):
        pyreft.ReftConfig.from_lora(tmp_path)
    with pytest.raises(pyreft.ReftError, match=r"positions: expected .*got 'last'"):
        pyreft.ReftConfig.from_lora(tmp_path, positions="last")
    for path in (tmp_path / "nothing", tmp_path.parent):
        with pytest.raises(pyreft.ReftError, match="expected an adapter"):
            pyreft.ReftConfig.from_lora(path, positions="l1")
    config = pyreft.ReftConfig.from_lora(tmp_path, positions="l1")
    with pytest.raises(pyreft.ReftError, match="is 24 wide, the intervention given for it 16"):
        pyreft.get_reft_model(tiny_llama(hidden_size=48, num_key_value_heads=2), config)
    with pytest.raises(pyreft.ReftError, match=r"expected one of .*got 'model.layers.0.self_attn.v_proj.output'"):
        pyreft.get_reft_model(MAKE["GPT-2"](), pyreft.ReftConfig.from_lora(tmp_path, positions="l1"))


# -- at some tokens, everywhere --------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_out(adapted, model, mask):
    """The edits of an adapter as hooks on its bare base model, at the tokens of a mask `[rows, tokens]`."""
    with contextlib.ExitStack() as hooks:
        for path, edit in interventions_of(adapted, "default").items():
            where, _, rest = path.rpartition(".reft_output")
            index = int(rest.rpartition(".")[2])
            entry = adapted.peft_config["default"].expand(number_of_layers(model))[index]
            site = find_site(model, entry.component, entry.layer, linear=True)
            assert site.path == where.removeprefix("base_model.model.")

            def hook(module, args, output, edit=edit, columns=site.columns):
                product = args[0] @ edit.A.weight.T @ edit.B.weight.T * edit.scale
                its = torch.arange(output.shape[-1])
                output, shape = output.clone(), output.shape
                output[..., its if columns is None else columns.take(its)] += product * mask.reshape(*shape[:-1], 1)
                return output

            hooks.enter_context(model.get_submodule(site.path).register_forward_hook(hook))
        yield


def places_of(model):
    """Every linear layer of a block that has a component, in the middle layer."""
    found = []
    for name in (*LINEAR, "down_output"):
        with contextlib.suppress(pyreft.ReftError):
            site = find_site(model, name, 1, linear=True)
            found.append((site.path, site.columns, name))
    return list({place[:2]: place[2] for place in found}.values())


LINEARS = [one for one in ARCHITECTURES if one.kind in ("causal", "classifier")]


@pytest.mark.parametrize("architecture", LINEARS, ids=lambda one: one.name)
def test_every_linear_layer_of_a_block(architecture):
    base = architecture.make()
    components = places_of(base)
    if not components:
        assert "there is no attention" in architecture.lacks.values() or architecture.name == "RecurrentGemma"
        return
    adapted = adapt(architecture.make(), layers=[1], component=components, positions="f1+l2")
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.zeros(2, 9)
    mask[:, [0, 7, 8]] = 1
    with torch.no_grad(), written_out(adapted, base, mask):
        expected = base(ids).logits
    found = adapted(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + architecture.rounding


def test_the_input_is_what_an_edit_before_left():
    places = [
        {"layer": 1, "component": "attention_value_output", "intervention": "bias"},
        {"layer": 1, "component": "attention_output", "intervention": "lora", "low_rank_dimension": 2},
    ]
    config = pyreft.ReftConfig(representations=places, positions="l1")
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), config))
    edits = list(interventions_of(adapted, "default").values())
    bias, lora = sorted(edits, key=lambda edit: isinstance(edit, LoraIntervention))
    ids = torch.randint(3, 96, (1, 6))
    seen, read = [], []
    base = tiny_llama()
    module = base.model.layers[1].self_attn.o_proj
    with module.register_forward_hook(lambda module, args, output: read.append((args[0], output))):
        base(ids)
    last = adapted.get_base_model().model.layers[1].self_attn.o_proj
    with last.register_forward_hook(lambda module, args, output: seen.append(output)):
        adapted(ids)
    x = read[0][0][:, -1] + bias.bias
    expected = module(x) + lora.scale * x @ lora.A.weight.T @ lora.B.weight.T
    torch.testing.assert_close(seen[0][:, -1], expected, rtol=1e-5, atol=5e-5)


def test_above_a_lora_of_pefts_and_a_quantized_layer():
    base = peft_lora(tiny_llama(), target_modules=["v_proj"]).get_base_model()
    ids = torch.randint(3, 96, (2, 9))
    plain = base(ids).logits
    adapted = adapt(base, component=["value_output", "attention_output"])
    assert not torch.equal(adapted(ids).logits, plain)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, plain)


# -- several components -------------------------------------------------------------------------------------------


def test_several_components():
    config = pyreft.ReftConfig(intervention="lora", layers=[0, 2], low_rank_dimension=2)
    assert config.component == ["value_output", "attention_output"]
    places = [(entry.layer, entry.component) for entry in config.expand(4)]
    assert places == [(layer, name) for layer in (0, 2) for name in ("value_output", "attention_output")]
    for given in ("query_output, mlp_output", ["query_output", "mlp_output"], ("query_output", "mlp_output")):
        assert pyreft.ReftConfig(component=given).component == ["query_output", "mlp_output"]
    assert pyreft.ReftConfig(component=["mlp_output"]).component == "mlp_output"
    assert pyreft.ReftConfig(intervention="loreft").component == "block_output"
    place = {"layer": 1, "component": ["query_output", "block_output"], "low_rank_dimension": 2}
    config = pyreft.ReftConfig(representations=[place, {"layer": 0, "intervention": "lora"}])
    assert [(entry.layer, entry.component) for entry in config.representations] == [
        *((1, "query_output"), (1, "block_output"), (0, "value_output"), (0, "attention_output"))
    ]
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(component="value_output,block_output")))
    assert [edit.embed_dim for edit in interventions_of(adapted, "default").values()] == [16, 32] * 4


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ([], "component: expected a name, a list of names, or text such as"),
        ("query_output,", "component: expected a name, a list of names"),
        ([3], "component: expected a name"),
        (3, "component: expected"),
        (["mlp_output", "mlp_output"], "component: a component stands twice"),
        (["encoder.mlp_output", "decoder.mlp_output"], "component: an encoder and a decoder have layers of their own"),
    ],
)
def test_components_that_cannot_be(component, message):
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.ReftConfig(component=component)
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.ReftConfig(representations={"layer": 1, "component": component})


# -- where there is nothing to read -------------------------------------------------------------------------------


@pytest.mark.parametrize("component", sorted(set(COMPONENTS) - {*LINEAR, "down_output"}))
def test_components_without_an_input(component):
    head = 0 if component.startswith("head_") else None
    if component in ("head_query_output", "head_key_output", "head_value_output"):
        site = find_site(tiny_llama(), component, 0, head, linear=True)
        assert (site.width, site.input_width) == (8, 32)
        return
    with pytest.raises(pyreft.ReftError, match=r"no linear layer writes|was not found"):
        find_site(tiny_llama(), component, 0, head, linear=True)


@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("Llama", "block_output", "component: no linear layer writes 'block_output'.*Expected query_output"),
        ("Llama", "model.layers.0.self_attn.v_proj.input", "component: no linear layer writes"),
        ("Llama", "model.layers.0.self_attn.output", "component: no linear layer writes"),
        ("Llama", "model.layers.0.input_layernorm.output", "component: no linear layer writes"),
        ("GPT-2", "gate_output", "component: 'gate_output' was not found"),
        ("DeepSeek-V3", "value_output", "component: 'value_output' cannot be edited in .*kv_b_proj': the cache holds"),
        ("Mixtral", "mlp_output", "component: 'mlp_output': '.*mlp' has experts, each with tokens of its own"),
        ("Qwen2-MoE", "up_output", "component: 'up_output': '.*mlp' has experts"),
    ],
)
def test_places_that_cannot_be(name, component, message):
    config = pyreft.ReftConfig(intervention="lora", component=component, layers=[0])
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.get_reft_model(MAKE[name](), config)


def test_a_fused_layer_whose_parts_are_not_known():
    model = MAKE["OPT"]()
    block = model.model.decoder.layers[0]
    block.fc1 = torch.nn.Linear(32, 128)  # for a gate and what it is multiplied with, in whatever order
    with pytest.raises(pyreft.ReftError, match=r"'up_output' cannot be told in .*fc1', which writes 128 numbers where"):
        find_site(model, "up_output", 0)


def test_a_ready_edit_of_another_input():
    ready = LoraIntervention(embed_dim=16, input_dim=31, low_rank_dimension=2)
    place = {"layer": 0, "component": "value_output", "intervention": ready}
    with pytest.raises(
        pyreft.ReftError, match=r"input_dim: the input of the value_output of layer 0 is 32 wide, .* 31"
    ):
        pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=place))


def test_one_formula_of_ones_own_that_reads_the_input():
    class GatedIntervention(pyreft.interventions.Intervention):
        reads_input = True

        def __init__(self, *, embed_dim, input_dim, **settings):
            super().__init__(embed_dim=embed_dim, **settings)
            self.weight = torch.nn.Parameter(torch.zeros(embed_dim, input_dim))

        def edit(self, h, x):
            return torch.tanh(x @ self.weight.T) * h

    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(intervention=GatedIntervention, positions="l2"))
    ids = torch.randint(3, 96, (2, 9))
    torch.testing.assert_close(adapted(ids).logits, tiny_llama()(ids).logits)
    batch = batch_of(rows_of(9, 7), "left")
    shaken(adapted)
    assert_exact(Reach(adapted), adapted, batch)
