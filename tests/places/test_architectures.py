"""What the library promises, on a tiny random model of every architecture of `architectures.py`."""

import contextlib
import copy
import functools
import inspect
from pathlib import Path

import peft
import pytest
import torch

import pyreft
from architectures import ARCHITECTURES, CHECKS, table
from conftest import pad, shaken
from pyreft.places.components import COMPONENTS, find_site, number_of_layers
from pyreft.places.structure import find_blocks
from pyreft.tuner import reft_layers
from pyreft.tuner.layer import ReftLayer

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def check(name):
    """Run a test for every architecture for which this check applies; the others are skipped with their reason."""
    rows = []
    for one in ARCHITECTURES:
        marks = [pytest.mark.skip(reason=one.without[name])] if name in one.without else []
        rows.append(pytest.param(one, id=one.name, marks=marks))
    return pytest.mark.parametrize("architecture", rows)


@functools.cache
def shared(architecture):
    """The model of an architecture; it is never adapted itself."""
    return architecture.make()


@pytest.fixture
def base(architecture):
    torch.manual_seed(0)
    return copy.deepcopy(shared(architecture))


def frozen(base):
    """A base with frozen weights, as beside an adapter: some kernels round otherwise where a weight can be trained."""
    return base.requires_grad_(False)


def adapt(model, **config):
    return peft.get_peft_model(
        model, pyreft.ReftConfig(**{"intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l2"} | config)
    )


def result(output):
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def states(model, inputs, path, side="output"):
    """The result of a forward, and the states at a module."""
    seen = []

    def remember(module, args, kwargs, output=None):
        found = output if side == "output" else (args[0] if args else kwargs["hidden_states"])
        seen.append(found if isinstance(found, torch.Tensor) else found[0])

    module = model.get_submodule(path)
    if side == "output":
        hook = module.register_forward_hook(remember, with_kwargs=True)
    else:
        hook = module.register_forward_pre_hook(remember, with_kwargs=True)
    with hook:
        return result(model(**inputs)), *seen


def tokens_of(architecture, inputs, prefix):
    """How many tokens pass a stack, `[rows, tokens]`."""
    if architecture.kind == "image":
        return 2, 5
    if architecture.kind == "speech" and prefix == "encoder.":
        return 2, 20
    return inputs["input_ids" if "input_ids" in inputs else "decoder_input_ids"].shape


@pytest.fixture
def edits(monkeypatch):
    """Every edit of a module: which it is, and the shape of the states that passed."""
    calls = []
    edit = ReftLayer.edit
    monkeypatch.setattr(ReftLayer, "edit", lambda self, h, *to: calls.append((self, h.shape)) or edit(self, h, *to))
    return calls


@check("attach")
def test_attach(architecture, base):
    inputs = architecture.inputs(base)
    for prefix in architecture.stacks:
        adapted = adapt(copy.deepcopy(base), component=f"{prefix}block_output")
        layers = reft_layers(adapted)
        assert len(layers) == number_of_layers(base, f"{prefix}block_output")
        edited = [layer["default"][0].embed_dim for layer in layers]
        list_path, blocks = find_blocks(base, prefix.rstrip("."))
        assert edited == [states(base, inputs, f"{list_path}.{n}")[1].shape[-1] for n in range(len(blocks))]
        assert not torch.equal(result(shaken(adapted)(**inputs)), result(base(**inputs)))


@check("components")
def test_components(architecture, base):
    inputs = architecture.inputs(base)
    for prefix in architecture.stacks:
        expected = set(COMPONENTS) - set(architecture.lacks)
        if prefix != "decoder.":
            expected -= {"cross_attention_input", "cross_attention_output"}
        found = set()
        for component in COMPONENTS:
            for layer in range(number_of_layers(base, f"{prefix}block_output")):
                head = 0 if component.startswith("head_") else None
                try:
                    site = find_site(base, f"{prefix}{component}", layer, head)
                except pyreft.ReftError as error:
                    assert component in str(error)  # noqa: PT017
                    continue
                found.add(component)
                _, there = states(base, inputs, site.path, site.side)
                rows, tokens = tokens_of(architecture, inputs, prefix)
                assert there.shape[:-1] in [(rows, tokens), (rows * tokens,)], site
                assert site.width == (there if site.columns is None else site.columns.take(there)).shape[-1]
        assert found == expected


@check("components")
def test_editing_components(architecture, base, edits):
    for prefix in architecture.stacks:
        places = []
        for component in COMPONENTS:
            for layer in range(number_of_layers(base, f"{prefix}block_output")):
                with contextlib.suppress(pyreft.ReftError):
                    find_site(base, f"{prefix}{component}", layer)
                    places.append({"component": f"{prefix}{component}", "layer": layer})
        adapted = adapt(copy.deepcopy(base), representations=places)
        edits.clear()
        adapted(**architecture.inputs(base))
        assert {layer for layer, _ in edits} == set(reft_layers(adapted))


@check("no-op")
def test_disabled(architecture, base):
    inputs = architecture.inputs(base)
    expected = result(frozen(base)(**inputs))
    adapted = shaken(adapt(base))
    with adapted.disable_adapter():
        assert torch.equal(result(adapted(**inputs)), expected)
    assert not torch.equal(result(adapted(**inputs)), expected)
    assert torch.equal(result(adapted.unload()(**inputs)), expected)


@check("reach")
def test_reach(architecture, base):
    inputs = architecture.inputs(base)
    path, _ = find_blocks(base, architecture.stacks[0].rstrip("."))
    plain, before = states(frozen(base), inputs, f"{path}.1")
    adapted = shaken(adapt(base, layers=1, positions="l2"))
    edited, after = states(adapted.get_base_model(), inputs, f"{path}.1")
    assert torch.equal(after[:, :-2], before[:, :-2])
    assert (after[:, -2:] != before[:, -2:]).any(-1).all()
    if architecture.generates and architecture.stacks == ("",):
        torch.testing.assert_close(edited[:, :-2], plain[:, :-2], rtol=0, atol=architecture.rounding)
        assert (edited[:, -2:] != plain[:, -2:]).any(-1).all()
    else:
        assert not torch.equal(edited, plain)


@check("train")
def test_training(architecture, base):
    inputs = architecture.inputs(base)
    inputs |= architecture.targets(inputs)
    inputs.pop("decoder_input_ids", None)
    adapted = adapt(base)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    weights = [parameter.detach().clone() for parameter in frozen]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    losses = []
    for _ in range(2):
        loss = adapted(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(frozen, weights, strict=True))


def prompt_of(architecture, inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


@check("cache")
@pytest.mark.parametrize("rule", ["f1+l2", "all"])
def test_generation_with_a_cache(architecture, base, rule, edits):
    prompt = prompt_of(architecture, architecture.inputs(base))
    told = {"output_logits": True, "return_dict_in_generate": True}
    plain = base.generate(**prompt, **GREEDY, **told).logits[0]
    adapted = shaken(adapt(base, positions=rule))
    without = adapted.generate(**prompt, **GREEDY, **told, use_cache=False)
    assert not torch.allclose(without.logits[0], plain, atol=1e-3)  # the likeliest token may be the same
    edits.clear()
    with_cache = adapted.generate(**prompt, **GREEDY, **told, use_cache=True)
    assert torch.equal(with_cache.sequences, without.sequences)
    if rule != "all":
        assert len(edits) == len(reft_layers(adapted))  # the prompt, once in every layer


def rows_alone(architecture, model):
    """Inputs of different lengths, one row each."""
    return [architecture.inputs(model, rows=1, tokens=tokens) for tokens in (11, 7, 8)]


def padded(rows, side):
    """The same rows in one batch."""
    ids, mask = pad([row["input_ids"][0].tolist() for row in rows], side)
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in rows[0].keys() - {"input_ids", "decoder_input_ids"}:
        if "token_type_ids" in name:
            batch[name] = pad([row[name][0].tolist() for row in rows], side)[0]
        else:
            batch[name] = torch.cat([row[name] for row in rows])
    return batch


@check("padding")
def test_padding(architecture, base):
    adapted = shaken(adapt(base))
    rows = [prompt_of(architecture, row) for row in rows_alone(architecture, base)]
    if architecture.generates:
        new = [adapted.generate(**row, **GREEDY)[0, -5:].tolist() for row in rows]
        for side in ("right",) if architecture.kind == "seq2seq" else ("left", "right"):
            assert adapted.generate(**padded(rows, side), **GREEDY)[:, -5:].tolist() == new, side
    else:
        together = result(adapted(**padded(rows, "right")))
        for row, found in zip(rows, together, strict=True):
            alone = result(adapted(**row))[0]
            torch.testing.assert_close(found[: len(alone)], alone, rtol=1e-4, atol=1e-5)


@check("reload")
def test_reload(architecture, base, tmp_path):
    inputs = architecture.inputs(base)
    adapted = shaken(adapt(copy.deepcopy(base), share_weights=False))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(result(again(**inputs)), result(adapted(**inputs)))


@pytest.mark.parametrize("rule", ["f1+l2", "all"])
@pytest.mark.parametrize("name", ["Mamba", "Mamba 2"])
def test_recurrent_states_are_continued_where_they_were_left(name, rule):
    model = next(one for one in ARCHITECTURES if one.name == name).make()
    adapted = shaken(adapt(model, positions=rule))
    ids = torch.randint(3, 90, (2, 9))
    expected = adapted.generate(input_ids=ids, **GREEDY)
    held = "cache" if "cache" in inspect.signature(model.forward).parameters else "cache_params"
    output = adapted(ids, use_cache=True)
    found = [output.logits[:, -1:].argmax(-1)]
    for _ in range(4):
        output = adapted(found[-1], **{held: output[held]})
        found.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, -1), expected[:, 9:])
    with adapted.disable_adapter():
        states = adapted(ids, use_cache=True)[held]
    with pytest.raises(pyreft.ReftError, match="does not say how many tokens it has seen"):
        adapted(ids[:, :1], **{held: states})


def test_every_exception_has_a_check():
    for one in ARCHITECTURES:
        assert one.without.keys() <= CHECKS.keys()
        assert one.lacks.keys() <= set(COMPONENTS)
        assert all({**one.without, **one.lacks}.values())
    assert len({one.name for one in ARCHITECTURES}) == len(ARCHITECTURES)


def test_none_of_the_common_architectures_is_lost():
    common = (
        "Llama, Mistral, Mixtral, Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE, Gemma, Gemma 2, Gemma 3, Phi, Phi-3, GPT-2, "
        "GPT-J, GPT-NeoX, GPT-Neo, GPT-BigCode, Bloom, Falcon, MPT, OPT, StableLM, StarCoder2, OLMo, OLMo 2, Cohere, "
        "Granite, DeepSeek-V3, SmolLM3, gpt-oss, Mamba, Mamba 2, RecurrentGemma, T5, BART, M2M100, BERT, RoBERTa, "
        "DeBERTa-v2, DistilBERT, ELECTRA, ModernBERT, ViT, CLIP's text tower, LLaVA, Qwen2-VL, Gemma 3 with images, "
        "Whisper"
    )
    assert set(common.split(", ")) <= {one.name for one in ARCHITECTURES}
    models = [shared(one).config.to_json_string() for one in ARCHITECTURES]
    assert len(set(models)) == len(models)  # none stands for two


def test_the_documented_table_is_this_one():
    document = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert document.read_text(encoding="utf-8") == table(), "python tests/architectures.py > docs/architectures.md"
