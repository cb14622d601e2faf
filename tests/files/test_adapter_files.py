"""An adapter's files: what of them is refused, with the file and the field, and what is not."""

import copy
import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyreft
from conftest import shaken, tiny_llama
from pyreft import pocket
from pyreft.data.encode import prompt_text
from pyreft.describe import describe
from pyreft.files.record import read_format, read_record
from pyreft.loading import base_of, check_generates, check_rules, load_adapted

IDS = torch.tensor([[5, 6, 7, 8, 9]])
UNIFORM = {"intervention": "loreft", "layers": [1], "positions": "f2+l2", "low_rank_dimension": 4}
ONE_BY_ONE = {
    "representations": [
        {"layer": 1, "positions": "l2", "low_rank_dimension": 2},
        {"layer": 2, "component": "block_input", "intervention": "reftr1", "intervention_kwargs": {"top_k": 3}},
    ]
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Saved adapters: of fields for all layers, and of representations one by one."""
    place = tmp_path_factory.mktemp("kept")
    for name, config in (("uniform", UNIFORM), ("one_by_one", ONE_BY_ONE)):
        adapted = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**config)))
        adapted.peft_config["default"].base_model_name_or_path = "some/base"
        adapted.save(place / name)
    return place


@pytest.fixture
def adapter(kept, tmp_path):
    return shutil.copytree(kept / "uniform", tmp_path / "adapter")


def change(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def by_ours(directory):
    return pyreft.ReftModel.load(directory, tiny_llama())


def by_peft(directory):
    return peft.PeftModel.from_pretrained(tiny_llama(), directory).eval()


def by_name(directory):
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM))
    adapted.load_adapter(directory, "other")
    adapted.set_adapter("other")
    return adapted.eval()


def over(directory):
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM))
    adapted.load_intervention(directory)
    return adapted.eval()


# -- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [by_ours, by_peft])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": 5}, "component: expected text or a list or tuple, got 5"),
        ({"component": [5]}, "component: expected a name, a list of names, or text"),
        ({"dropout": "x"}, "dropout: expected a number, got 'x'"),
        ({"dropout": [0]}, r"dropout: expected a number, got \[0\]"),
        ({"dropout": 1.5}, "dropout: expected a share from 0 to 1, got 1.5"),
        ({"act_fn": [1]}, r"act_fn: expected text, got \[1\]"),
        ({"base_model_shape": "x"}, "base_model_shape: expected fields, got 'x'"),
        (
            {"base_model_shape": {"num_hidden_layers": 10**6}},
            "num_hidden_layers: expected a number from 1 to 10,000",
        ),
        ({"intervention_kwargs": [1]}, r"intervention_kwargs: expected fields, got \[1\]"),
        ({"layers": [True]}, r"layers: expected 'all', .*, got \[True\]"),
        ({"layers": "²"}, "layers: expected 'all', .*, got '²'"),
        ({"layers": "9" * 5000}, "layers: expected 'all', .*, got '9{5}"),
        ({"positions": ["l1"]}, r"positions: expected f<n>, .*, got \['l1'\]"),
        ({"positions": "l" + "9" * 5000}, "positions: expected f<n>"),
        ({"task_type": "causal_lm"}, "task_type: Invalid task type: 'causal_lm'. Must be one of"),
        ({"base_model_name_or_path": 0.5}, "base_model_name_or_path: expected text, got 0.5"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list.*, got 'lm_head'"),
        ({"modules_to_save": [1]}, "modules_to_save: expected text, got 1"),
        ({"low_rank_dimension": 10**9}, "low_rank_dimension: expected a rank from 1 to the width 32"),
        ({"low_rank_dimension": True}, "low_rank_dimension: expected a whole number, got True"),
        ({"share_weights": "no"}, "share_weights: expected true or false, got 'no'"),
        ({"representations": [3], "layers": "all"}, "representations: expected fields, got 3"),
        ({"representations": 3, "layers": "all"}, "representations: expected a list"),
        ({"representations": [{"layer": "x"}], "layers": "all"}, "layers: expected 'all', .*, got 'x'"),
        ({"representations": [{"layer": 1, "head": "x"}], "layers": "all"}, "head: expected a whole number, got 'x'"),
        ({"representations": [{"layer": 1, "side": "left"}], "layers": "all"}, "side: expected prefix or suffix"),
    ],
)
def test_values_that_a_field_cannot_have(adapter, reader, changes, message):
    change(adapter, **changes)
    with pytest.raises(pyreft.ReftError, match=message) as caught:
        reader(adapter)
    # PEFT gives us what stands in the file; the model is not yet known where a rank is read
    if reader is by_ours and "width" not in message:
        assert str(adapter / "adapter_config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": "3"}, "top_k: expected a number, got '3'"),
        ({"top_k": 2.5}, "top_k: expected at least one latent that counts, got 2.5"),
        ({"l1": None}, "l1: expected a number, got None"),
        ({"dropout": "x"}, "dropout: expected a number, got 'x'"),
    ],
)
def test_arguments_that_an_intervention_cannot_have(kept, tmp_path, given, message):
    adapter = shutil.copytree(kept / "one_by_one", tmp_path / "adapter")
    entries = json.loads((adapter / "adapter_config.json").read_text())["representations"]
    entries[1]["intervention_kwargs"] = given
    change(adapter, representations=entries)
    with pytest.raises(pyreft.ReftError, match=message):
        by_ours(adapter)


@pytest.mark.parametrize("name", ["positions", "intervention"])
def test_what_the_tensors_do_not_tell_has_no_default(adapter, kept, tmp_path, name):
    """Of another rule or formula the tensors may be the same."""
    path = adapter / "adapter_config.json"
    data = json.loads(path.read_text())
    for damaged in (data | {name: None}, {other: value for other, value in data.items() if other != name}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(pyreft.ReftError, match=rf"adapter_config\.json: {name}: the file does not say it"):
            by_ours(adapter)
    by_ours(kept / "one_by_one")  # whose places say it, each


def test_edits_at_tokens_that_each_call_names(kept, adapter):
    check_rules(adapter)
    with pytest.raises(
        pyreft.ReftError, match=r"one_by_one: the adapter has no position rule: its tokens come with each"
    ):
        check_rules(kept / "one_by_one")


@pytest.mark.parametrize("kind", [None, "reft", "LORAA"])
def test_a_method_that_is_none(adapter, kind):
    change(adapter, peft_type=kind)
    with pytest.raises(pyreft.ReftError, match=f"peft_type: expected REFT or another method of PEFT, got {kind!r}"):
        load_adapted(adapter, "pocket")


def test_fields_that_are_not_known(adapter):
    expected = by_ours(adapter)(IDS).logits
    change(adapter, field_of_a_later_peft=None)
    assert torch.equal(by_ours(adapter)(IDS).logits, expected)
    change(adapter, layers_=3)
    with pytest.raises(
        pyreft.ReftError, match=r"adapter_config.json: layers_: there is no such field. Did you mean 'la"
    ):
        by_ours(adapter)


def paths(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


ODD = [None, True, -1, 10**30, 0.5, float("nan"), "", "x", "²", "\ud800", "a\0b", [], [None], [[1]], {}, {"a": 1}]


@pytest.mark.filterwarnings("ignore")  # their texts may hold half a character, which xdist cannot hand over
@pytest.mark.parametrize("name", ["uniform", "one_by_one"])
def test_whatever_stands_in_a_config_it_is_read_or_refused(kept, tmp_path, name):
    adapter = shutil.copytree(kept / name, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    good, base = json.loads(path.read_text()), tiny_llama()
    refused = 0
    for place in [*paths(good), ("head",), ("side",), ("new",)]:
        for value in ODD:
            data = {"config": copy.deepcopy(good)}
            inner, last = data, "config"
            for key in place:
                inner, last = inner[last], key
            inner[last] = value
            path.write_text(json.dumps(data["config"]))
            try:
                pyreft.ReftModel.load(adapter, base)(IDS)
                describe(adapter), base_of(adapter), check_generates(adapter)
            except pyreft.ReftError:
                refused += 1
    assert refused > 100


def test_a_config_that_is_no_file(adapter):
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").mkdir()
    with pytest.raises(pyreft.ReftError, match=r"found no adapter_config.json"):
        by_ours(adapter)


def test_a_config_edited_by_hand_stays_valid(adapter):
    expected = by_ours(adapter)(IDS).logits
    change(adapter, base_model_name_or_path="elsewhere/base", revision="main", inference_mode=False)
    for reader in (by_ours, by_peft, by_name, over):
        assert torch.equal(reader(adapter)(IDS).logits, expected)
    assert base_of(adapter) == "elsewhere/base"


# -- the weights --------------------------------------------------------------------------------------------------


def spoil(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "bias" in name)
    tensors[name] = edit(tensors[name])
    save_file(tensors, path)
    return name


def first_is(number):
    return lambda tensor: torch.cat((torch.tensor([number]), tensor[1:].double()))


@pytest.mark.parametrize("reader", [by_ours, by_peft, by_name, over])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (first_is(torch.nan), "1 of 4 numbers are not finite"),
        (first_is(-torch.inf), "1 of 4 numbers are not finite"),
        (first_is(1e300), "1 of 4 numbers are not finite"),  # in float32
        (lambda tensor: tensor.to(torch.int8), "expected numbers of floating point, got int8"),
        (lambda tensor: tensor.to(torch.int64), "expected numbers of floating point, got int64"),
        (lambda tensor: tensor.bool(), "expected numbers of floating point, got bool"),
        (lambda tensor: tensor.to(torch.complex64), "expected numbers of floating point, got complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "expected numbers of floating point, got float8"),
    ],
)
def test_numbers_that_no_training_leaves(adapter, reader, edit, message):
    name = spoil(adapter, edit)
    with pytest.raises(pyreft.ReftError, match=rf"{re.escape(name)}: {message}"):
        reader(adapter)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_precision_are_fine(adapter, kind):
    expected = by_ours(adapter)(IDS).logits
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(kind) for name, tensor in load_file(path).items()}, path)
    for reader in (by_ours, by_peft, by_name, over):
        found = reader(adapter)(IDS).logits
        torch.testing.assert_close(found, expected, atol=0 if kind is torch.float64 else 0.5, rtol=0)


def test_a_head_that_diverged_is_refused(tmp_path):
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM))
    head = adapted.get_base_model().lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        head[0, 0] = torch.nan
    adapted.save(tmp_path)
    for reader in (by_ours, by_peft):
        with pytest.raises(pyreft.ReftError, match=r"lm_head\..*weight: 1 of 3072 numbers are not finite"):
            reader(tmp_path)


def test_an_adapter_that_is_refused_is_not_there(adapter):
    adapted = pyreft.ReftModel.load(adapter, tiny_llama())
    expected = adapted(IDS).logits
    spoil(adapter, first_is(torch.nan))
    with pytest.raises(pyreft.ReftError, match="not finite"):
        adapted.load_adapter(adapter, "second")
    with pytest.raises(pyreft.ReftError, match="not finite"):
        adapted.load_intervention(adapter)
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(adapted(IDS).logits, expected)


def test_a_second_adapter_with_tensors_that_do_not_fit(adapter):
    adapted = pyreft.ReftModel.load(adapter, tiny_llama())
    expected = adapted(IDS).logits
    for changes in ({"layers": [2]}, {"low_rank_dimension": 3}):
        change(adapter, **UNIFORM | changes)
        with pytest.raises(pyreft.ReftError, match=r"expected the 3 tensors of .* is missing|size mismatch"):
            adapted.load_adapter(adapter, "second")
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(adapted(IDS).logits, expected)


def test_what_a_config_asks_for_is_not_made_if_its_file_is_too_small(adapter):
    with torch.device("meta"):
        base = tiny_llama(hidden_size=4096, num_attention_heads=32)
    before = base.state_dict().keys()
    entry = {"layer": 1, "positions": "l1", "low_rank_dimension": 4096}  # 134 MB each
    change(adapter, layers="all", representations=[entry] * 50, base_model_shape=None)
    with pytest.raises(
        pyreft.ReftError, match="the file does not fit its config, which asks for 33,558,528 numbers or"
    ):
        pyreft.ReftModel.load(adapter, base)
    change(adapter, layers=[1], representations=None, modules_to_save=["layers.0", "lm_head"])
    with pytest.raises(pyreft.ReftError, match=r"modules_to_save: .*, it has nothing of 'model.layers.0'"):
        pyreft.ReftModel.load(adapter, base)
    assert base.state_dict().keys() == before


def header(shape, offsets):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header([10**9, 10**9], [0, 4]) + bytes(4),
        header([2**62, 8], [0, 0]),
        header([2**40], [0, 2**42]),
        header([-1], [0, 4]),
        (10**15).to_bytes(8, "little") + b"{}",
        b"\xff" * 8,
        b"",
    ],
)
def test_headers_that_ask_for_too_much(adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    for reader in (by_ours, over, describe):
        with pytest.raises(pyreft.ReftError, match="is damaged or was cut short"):
            reader(adapter)


# -- who writes them ----------------------------------------------------------------------------------------------


def test_adapters_that_others_save_are_loaded(tmp_path):
    config = pyreft.ReftConfig(**UNIFORM)
    plain = tiny_llama()
    plain.add_adapter(config)
    shaken(plain).save_pretrained(tmp_path / "transformers")
    wrapped = shaken(peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM)))
    wrapped.save_pretrained(tmp_path / "peft")
    for name, model in (("transformers", plain), ("peft", wrapped)):
        expected = model(IDS).logits
        for reader in (by_ours, by_peft, by_name, over):
            assert torch.equal(reader(tmp_path / name)(IDS).logits, expected)
        by_ours(tmp_path / name).save(tmp_path / name)  # over it, with what is beside it
        assert torch.equal(by_peft(tmp_path / name)(IDS).logits, expected)


def test_an_adapter_below_a_directory(tmp_path):
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM))
    adapted.add_adapter("second", pyreft.ReftConfig(**UNIFORM | {"positions": "l1"}))
    shaken(adapted).save(tmp_path)
    adapted.set_adapter("second")
    expected = adapted(IDS).logits
    again = pyreft.ReftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="second")
    assert again.peft_config["default"].positions == "l1"
    assert torch.equal(again(IDS).logits, expected)
    again = pyreft.ReftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path, "x", subfolder="second")
    again.set_adapter("x")
    assert torch.equal(again(IDS).logits, expected)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    peft.get_peft_model(pocket.load()[0], peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"target_modules": ["q_proj"]}, None, "0 tensors are missing, 14 are not known"),
        ({"lora_alpha": "x"}, None, "does not fit the base model 'pocket'"),
        ({}, lambda tensors: dict(list(tensors.items())[1:]), "1 tensors are missing .*q_proj.lora_A.weight"),
        ({}, lambda tensors: {name: value / 0 for name, value in tensors.items()}, "numbers are not finite"),
    ],
)
def test_a_lora_that_peft_would_take_in_part(lora, tmp_path, changes, edit, message):
    place = shutil.copytree(lora, tmp_path / "lora")
    load_adapted(place, "pocket")
    change(place, **changes)
    if edit is not None:
        save_file(edit(load_file(place / "adapter_model.safetensors")), place / "adapter_model.safetensors")
    with pytest.raises(pyreft.ReftError, match=message):
        load_adapted(place, "pocket")


@pytest.mark.filterwarnings("ignore")  # PEFT's, of the fields and the tensors
def test_edits_of_which_a_lora_is_said(adapter):
    change(adapter, peft_type="LORA")
    with pytest.raises(
        pyreft.ReftError, match=r"the file does not fit its config: 28 tensors are missing .*, 3 are not"
    ):
        load_adapted(adapter, "pocket")


def test_a_pickle_is_read_and_replaces_older_weights(tmp_path):
    for number, safe in enumerate((True, False, False, True)):
        adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**UNIFORM | {"layers": [number]}))
        adapted.get_base_model().lm_head.weight.requires_grad_(True)
        adapted.add_adapter("second", pyreft.ReftConfig(**UNIFORM))
        expected = shaken(adapted)(IDS).logits
        adapted.save_pretrained(tmp_path, safe_serialization=safe)
        for place in (tmp_path, tmp_path / "second"):
            names = {path.name for path in place.iterdir()} - {"second", "README.md", "adapter_config.json"}
            assert names == {"adapter_model.safetensors" if safe else "adapter_model.bin"}
        for reader in (by_ours, by_peft):
            assert torch.equal(reader(tmp_path)(IDS).logits, expected)


# -- the record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[]", "recipe.json: expected names and their values"),
        ('{"task": 3}', "recipe.json: task: expected text, got 3"),
        ('{"seed": "1"}', "recipe.json: seed: expected a whole number, got '1'"),
        ('{"decoding": [1]}', "recipe.json: decoding: expected fields"),
        ('{"format": {}}', "recipe.json: format: expected text"),
        ('{"task":', "recipe.json: the file is damaged, it is not JSON"),
    ],
)
def test_records_that_cannot_be_used(adapter, record, message):
    (adapter / "recipe.json").write_text(record)
    for reader in (read_record, read_format, check_generates):
        with pytest.raises(pyreft.ReftError, match=message):
            reader(adapter)


def test_no_record_and_one_that_is_no_file(adapter):
    assert read_record(adapter) == {}
    (adapter / "recipe.json").mkdir()
    with pytest.raises(pyreft.ReftError, match=r"recipe.json: expected a file, this is a directory"):
        read_record(adapter)


def test_a_format_that_is_not_known(adapter):
    change(adapter, prompt_format="chats")
    assert read_format(adapter) == "chats"
    with pytest.raises(
        pyreft.ReftError, match=r"format: expected text, chat, alpaca, got 'chats'. Did you mean 'chat'"
    ):
        prompt_text(pocket.load()[1], "a", "chats")
