"""Checkpoints of the original: what they hold, and those that cannot be used (their numbers: test_oracle.py)."""

import copy
import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from torch.nn.utils.parametrizations import orthogonal

import pyreft
from conftest import tiny_llama
from oracle_cases import LEGACY, ORACLE, load_case, read_case
from pyreft.files.original import legacy_keys

ONE, UNTIED = "llama_loreft_l1_one_layer", "llama_loreft_f2l2_untied"


@pytest.fixture
def copied(tmp_path):
    """A function that copies a checkpoint to where it may be changed."""
    return lambda name=ONE: shutil.copytree(ORACLE / "legacy" / name, tmp_path / name)


def load(directory, model=None, **options):
    model = read_case(ONE)[2] if model is None else model
    return pyreft.ReftModel.load(directory, model, **{"act_fn": "linear"} | options)


def states(adapted):
    return {name: value.clone() for name, value in adapted.state_dict().items()}


def change(file, edit):
    """Edit the tensors of a pickle."""
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)


def only_pickle(directory):
    (file,) = directory.glob("intkey_*.bin")
    return file


# -- what a checkpoint holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEGACY)
def test_saved_again_and_reloaded_bit_by_bit(name, tmp_path):
    _, tensors, adapted, _ = load_case(name, legacy=True)
    inputs = {
        "input_ids": tensors["input_ids"],
        "attention_mask": tensors["attention_mask"],
        "intervention_locations": tensors["locations"],
    }
    expected = adapted(**inputs).logits
    adapted.save(tmp_path)
    again = pyreft.ReftModel.from_pretrained(read_case(name)[2], tmp_path)
    assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.parametrize("name", LEGACY)
def test_the_keys_are_those_of_the_original(name):
    config = json.loads((ORACLE / "legacy" / name / "config.json").read_text())
    adapted = load_case(name, legacy=True)[2]
    assert legacy_keys(adapted.peft_config["default"].representations) == config["sorted_keys"]


def test_the_config_says_what_was_loaded():
    config = load(ORACLE / "legacy" / "llama_noreft_f2l3_tied_all").peft_config["default"]
    assert [entry.to_dict() for entry in config.representations] == [
        {
            "component": "block_output",
            "layer": layer,
            "intervention": "noreft",
            "low_rank_dimension": 3,
            "dropout": 0.0,
            "act_fn": "linear",
            "add_bias": True,
        }
        for layer in range(4)
    ]


def test_loaded_for_training_or_not():
    place = ORACLE / "legacy" / ONE
    model = read_case(ONE)[2]
    assert not pyreft.ReftModel.from_pretrained(model, place, act_fn="linear").get_trainable_parameters()
    adapted = pyreft.ReftModel.from_pretrained(model, place, act_fn="linear", is_trainable=True)
    assert adapted.training
    assert adapted.count_parameters(include_model=True) == 2 * 32 * 4 + 4
    with pytest.raises(pyreft.ReftError, match="key_mapping: of no use for files of the original"):
        pyreft.ReftModel.from_pretrained(model, place, key_mapping={})


@pytest.mark.parametrize("rank", [3, 8])
def test_the_stored_parametrization_of_r(copied, rank):
    """Against torch's own, after training has moved it; where it is square, torch takes another formula."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.empty(8, rank))
    torch.nn.init.orthogonal_(layer.weight)
    orthogonal(layer)
    with torch.no_grad():
        free = layer.parametrizations.weight.original
        free += torch.randn_like(free).tril(-1)
    place = copied("llama_direft_l1_one_layer")
    stored = {f"rotate_layer.{name}": value for name, value in layer.state_dict().items()}
    stored |= {"learned_source.weight": torch.randn(rank, 8), "learned_source.bias": torch.randn(rank)}
    torch.save(stored, only_pickle(place))
    (intervention,) = load(place, tiny_llama(hidden_size=8)).interventions.values()
    torch.testing.assert_close(intervention.rotate_layer.weight, layer.weight, atol=1e-6, rtol=0)


def test_values_rounded_to_bfloat16(copied):
    place = copied()
    change(only_pickle(place), lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    (rounded,), (exact,) = (load(at).interventions.values() for at in (place, ORACLE / "legacy" / ONE))
    rotation = rounded.rotate_layer.weight
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation, exact.rotate_layer.weight, atol=1e-2, rtol=0)
    assert rounded.learned_source.weight.dtype == torch.float32


# -- the activation, which it does not hold -----------------------------------------------------------------------


def test_one_warning_names_what_is_assumed():
    with pytest.warns(UserWarning, match=r"do not name the activation.*act_fn='relu'.*act_fn='linear'") as caught:
        load(ORACLE / "legacy" / UNTIED, act_fn=None)
    assert len(caught) == 1


@pytest.mark.parametrize(("name", "act_fn"), [(ONE, "linear"), (ONE, "relu"), ("llama_lobireft_l1_one_layer", None)])
def test_no_warning_where_it_is_said_or_has_no_part(name, act_fn):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = load(ORACLE / "legacy" / name, act_fn=act_fn)
    assert adapted.peft_config["default"].representations[0].act_fn == act_fn


def test_the_activation_that_is_said_is_used():
    h = torch.randn(5, 32)
    (linear,), (relu,) = (load(ORACLE / "legacy" / ONE, act_fn=f).interventions.values() for f in ("linear", "relu"))
    expected = h + (torch.relu(linear.source(h)) - h @ linear.basis().T) @ linear.basis()
    torch.testing.assert_close(relu(h), expected)


def test_our_own_files_name_it_themselves(tmp_path):
    load(ORACLE / "legacy" / ONE).save(tmp_path)
    with pytest.raises(pyreft.ReftError, match=r"act_fn: .* says itself which activation"):
        load(tmp_path, act_fn="relu")


# -- folders of the original's trainers ---------------------------------------------------------------------------


def as_trainer_wrote(place, model_state):
    """Turn a checkpoint into one of a trainer: in a subfolder, without config.json, with the model's part."""
    inner = place / "intervenable_model"
    inner.mkdir()
    for file in place.glob("intkey_*.bin"):
        file.rename(inner / file.name)
    (place / "config.json").unlink()
    torch.save(model_state, inner / "pytorch_model.bin")
    return inner


def config_of(name):
    case = json.loads((ORACLE / f"{name}.json").read_text())
    shared = {"low_rank_dimension": case["low_rank_dimension"], "intervention": case["intervention"]}
    return [{**place, **shared, "add_bias": case["intervention"] == "nodireft"} for place in case["representations"]]


def test_a_subfolder_is_found(copied, tmp_path):
    copied().rename(tmp_path / "intervenable_model")
    assert torch.equal(
        *(next(iter(load(at).interventions.values())).basis() for at in (tmp_path, ORACLE / "legacy" / ONE))
    )


def test_without_config_it_is_loaded_into_a_model_of_the_same_places(copied):
    place = copied(UNTIED)
    as_trainer_wrote(place, {})
    with pytest.raises(pyreft.ReftError, match=r"without a config.json.*get_reft_model.*load_intervention\(\)"):
        load(place)
    adapted = pyreft.get_reft_model(read_case(UNTIED)[2], pyreft.ReftConfig(representations=config_of(UNTIED)))
    adapted.load_intervention(place)
    for ours, theirs in zip(adapted.interventions.values(), load_case(UNTIED, True)[3], strict=True):
        assert torch.equal(ours.basis(), theirs.basis())
        assert torch.equal(ours.learned_source.weight, theirs.learned_source.weight)


@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_the_part_of_the_base_model(copied, modules_to_save):
    name = "roberta_nodireft_f1"
    place = copied(name)
    head = {name: torch.randn_like(p) for name, p in read_case(name)[2].named_parameters() if "classifier" in name}
    as_trainer_wrote(place, {name: torch.nn.Parameter(value) for name, value in head.items()})
    config = pyreft.ReftConfig(representations=config_of(name), modules_to_save=modules_to_save)
    adapted = pyreft.get_reft_model(read_case(name)[2], config)
    adapted.load_intervention(place / "intervenable_model", include_model=True)
    _, tensors, expected, _ = load_case(name, legacy=True)
    expected.get_base_model().load_state_dict(head, strict=False)
    inputs = {"input_ids": tensors["input_ids"], "intervention_locations": tensors["locations"]}
    assert torch.equal(adapted.eval()(**inputs).logits, expected(**inputs).logits)
    shutil.copy(ORACLE / "legacy" / name / "config.json", place / "intervenable_model")
    whole = load(place, read_case(name)[2], include_model=True)
    assert torch.equal(whole(**inputs).logits, expected(**inputs).logits)


# -- checkpoints that cannot be used ------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def written(data):
    return lambda place: torch.save(data, only_pickle(place))


def edited(edit):
    return lambda place: change(only_pickle(place), edit)


def config_edited(**values):
    def edit(place):
        path = place / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: only_pickle(place).unlink(), r"intkey_layer_2.*#0.bin is missing; was the checkpoint copied"),
        (lambda place: only_pickle(place).write_bytes(only_pickle(place).read_bytes()[:-90]), "the file is damaged"),
        (lambda place: only_pickle(place).write_bytes(b""), "the file is damaged"),
        (lambda place: only_pickle(place).write_bytes(b"\x80\x04nonsense"), "the file is damaged"),
        (lambda place: only_pickle(place).write_bytes(pickle.dumps(Evil())), "is damaged, or holds more than tensors"),
        (written({"weight": Evil()}), "is damaged, or holds more than tensors"),
        (written([torch.ones(2)]), "expected tensors by name, found something else"),
        (written({"weight": "text"}), "expected tensors by name, found something else"),
        (written({}), "expected the tensors of LoreftIntervention, found none"),
        (edited(lambda t: t.pop("bias")), r"found learned_source.weight \[4, 32\], rotate_layer.free \[32, 4\]"),
        (edited(lambda t: t.update(weight=torch.ones(4, 9))), r"found .*learned_source.weight \[4, 9\]"),
        (edited(lambda t: t.update(rotate_layer=torch.ones(32))), "expected the tensors of LoreftIntervention"),
        (edited(lambda t: t["rotate_layer"].mul_(1.1)), "with orthonormal columns, up to 0.05; these are off by 0.21"),
        (edited(lambda t: t["rotate_layer"].fill_(torch.nan)), "rotate_layer: 128 of 128 numbers are not finite"),
        (edited(lambda t: t.update({"rotate_layer.parametrizations.weight.original": torch.ones(32, 4)})), "two parts"),
        (lambda place: (place / "config.json").write_text("{"), r"config.json: the file is damaged, it is not JSON"),
        (lambda place: (place / "config.json").write_text("[]"), "expected the lists sorted_keys, intervention_types"),
        (lambda place: (place / "config.json").write_text('{"model_type": "llama"}'), "expected the lists sorted_keys"),
        (lambda place: (place / "config.json").unlink(), "without a config.json"),
        (config_edited(sorted_keys=[]), "expected the lists sorted_keys"),
        (config_edited(sorted_keys=[], intervention_types=[], representations=[]), "at least one edited place"),
        (config_edited(representations=[[2]]), "expected the lists sorted_keys"),
        (config_edited(representations=[["two", "block_output"]]), "expected the lists sorted_keys"),
        (config_edited(representations=[[9, "block_output"]]), "layer: this model has the layers 0 to 3, got 9"),
        (config_edited(representations=[[2, "head_output"]]), "component: expected one of .*got 'head_output'"),
        (
            config_edited(intervention_types=["<class 'os.system'>"]),
            r"the intervention <class 'os.system'> is not one of pyreft's \(Loreft.* with the program that made it",
        ),
        (
            config_edited(intervention_types=["<class 'mine.LoreftIntervention'>"]),
            "the intervention <class 'mine.LoreftIntervention'> is not one of pyreft's",
        ),
        (
            config_edited(intervention_types=["<class 'pyreft.interventions.NoreftIntervention'>"]),
            "expected the tensors of NoreftIntervention, found learned_source.bias",
        ),
    ],
)
def test_damaged_checkpoints(copied, monkeypatch, tmp_path, damage, message):
    monkeypatch.chdir(tmp_path)
    place = copied()
    damage(place)
    model = read_case(ONE)[2]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pyreft.ReftError, match=message):
        load(place, model)
    assert not (tmp_path / "executed").exists()
    assert model.state_dict().keys() == before.keys()
    assert not hasattr(model, "peft_config")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_base_model_of_another_width():
    model = tiny_llama(hidden_size=64)
    before = model.state_dict().keys()
    with pytest.raises(pyreft.ReftError, match="the block_output of layer 2 is 64 wide, the intervention given for it"):
        load(ORACLE / "legacy" / ONE, model)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda inner: (inner / "pytorch_model.bin").unlink(), "has no pytorch_model.bin.*use include_model=False"),
        (lambda inner: torch.save({"a.b": torch.ones(2)}, inner / "pytorch_model.bin"), r"no parameter 'a.b' .* \[2\]"),
        (lambda inner: torch.save(Evil(), inner / "pytorch_model.bin"), "is damaged, or holds more than tensors"),
        (lambda inner: next(iter(sorted(inner.glob("intkey_layer_3*#1.bin")))).unlink(), "#1.bin is missing"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_interventions(copied, damage, message):
    place = copied(UNTIED)
    damage(as_trainer_wrote(place, {}))
    adapted = pyreft.get_reft_model(read_case(UNTIED)[2], pyreft.ReftConfig(representations=config_of(UNTIED)))
    before = states(adapted)
    with pytest.raises(pyreft.ReftError, match=message):
        adapted.load_intervention(place)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_of_other_interventions(copied):
    adapted = pyreft.get_reft_model(
        read_case(ONE)[2], pyreft.ReftConfig(layers=2, low_rank_dimension=2, intervention="loreft")
    )
    with pytest.raises(pyreft.ReftError, match=r"expected the tensors of LoreftIntervention, .*\[2, 32\].*\[4, 32\]"):
        adapted.load_intervention(ORACLE / "legacy" / ONE, include_model=False)
    # the same tensors, in another formula
    adapted = load(ORACLE / "legacy" / "llama_lobireft_l1_one_layer")
    with pytest.raises(pyreft.ReftError, match=r"this model, \['LobireftInt.*; it holds \['ConsreftIntervention'\]"):
        adapted.load_intervention(ORACLE / "legacy" / "llama_consreft_l1_one_layer", include_model=False)


def test_a_directory_of_neither(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(pyreft.ReftError, match=r"expected an adapter's directory, found no adapter_config.json.$"):
        load(tmp_path)
