"""ReftModel: the original's calls, its members, saving and loading."""

import copy
import errno
import json
import os
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BatchEncoding, GenerationConfig

import pyreft
from conftest import pad, shaken, tiny_llama
from pyreft import pocket, smollm2
from pyreft.errors import ReftError

IDS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(5))
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def one_layer(layer=2):
    intervention = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4)
    place = {"layer": layer, "component": "block_output", "low_rank_dimension": 4, "intervention": intervention}
    return pyreft.ReftConfig(representations=place)


@pytest.fixture
def adapted(model):
    return shaken(pyreft.get_reft_model(model, one_layer()))


def at(*rows):
    return {"sources->base": (None, [[list(row) for row in rows]])}


def test_an_original_call_returns_a_pair(model, adapted):
    inputs = BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    none, edited = adapted(inputs, unit_locations=at([9], [9]), labels=IDS)
    assert none is None
    plain = adapted(**inputs, labels=IDS, intervention_locations=[[[9]], [[9]]])
    assert torch.equal(edited.logits, plain.logits)
    assert torch.equal(edited.loss, plain.loss)
    base, _ = adapted(inputs, unit_locations=at([9], [9]), output_original_output=True)
    assert torch.equal(base.logits, tiny_llama()(IDS).logits)
    assert not torch.equal(base.logits, edited.logits)


def test_an_original_generation_returns_a_pair(adapted):
    base, edited = adapted.generate(
        {"input_ids": IDS},
        unit_locations=at([9], [9]),
        intervene_on_prompt=True,
        output_original_output=True,
        **OPTIONS,
    )
    assert torch.equal(base, tiny_llama().generate(IDS, **OPTIONS))
    assert not torch.equal(base, edited)
    everywhere = adapted.generate({"input_ids": IDS}, unit_locations={"base": 9}, **OPTIONS)[1]
    assert torch.equal(everywhere, edited)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_original_batch_generates_what_each_prompt_does(prompts, side):
    places = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": 4, "intervention": "loreft"}
        for layer in (1, 3)
    ]
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(representations=places)))

    def located(length, shift=0):
        """The first two tokens in one layer, the last one in the other."""
        return [[at + shift for at in range(min(2, length))], [length - 1 + shift]]

    def by_intervention(rows):
        return {"sources->base": (None, [list(each) for each in zip(*rows, strict=True)])}

    alone = []
    for prompt in prompts:
        call = {"unit_locations": by_intervention([located(len(prompt))]), **OPTIONS}
        alone.append(adapted.generate({"input_ids": torch.tensor([prompt])}, **call)[1][0, len(prompt) :].tolist())
    ids, mask = pad(prompts, side)
    shifts = [ids.shape[1] - len(prompt) if side == "left" else 0 for prompt in prompts]
    base, tokens = adapted.generate(
        BatchEncoding({"input_ids": ids, "attention_mask": mask}),
        unit_locations=by_intervention([located(len(p), shift) for p, shift in zip(prompts, shifts, strict=True)]),
        intervene_on_prompt=True,
        output_original_output=True,
        **OPTIONS,
    )
    assert tokens[:, ids.shape[1] :].tolist() == alone
    assert base[:, ids.shape[1] :].tolist() != alone


def test_without_a_rule_and_without_locations_the_model_is_the_base(model, adapted):
    assert torch.equal(adapted(IDS).logits, tiny_llama()(IDS).logits)
    with pytest.raises(pyreft.ReftError, match="this model's config has no position rule"):
        adapted.generate({"input_ids": IDS})


@pytest.mark.parametrize(
    ("locations", "got"),
    [
        (at([9], [9], [9]), "with 1 interventions and a batch of 2, so [1][2][positions]; got [1][3][1]."),
        ({"sources->base": (None, [[[9], [9]]] * 2)}, "so [1][2][positions]; got [2][2][1]."),
        ({"sources->base": (None, [[[9, 8], [9]], [[9]]])}, "so [1][2][positions]; got [2][1 or 2][1 or 2]."),
        (at([9], [9]) | {"sources->base": (None, [[9], [9]])}, "so [1][2][positions]; got [2][1]."),
        (at([-1], [-1]), "and indices from 0, got [[[-1], [-1]]]."),
        ({"sources->base": (None, [9, 9])}, "got {'sources->base': (None, [9, 9])}."),
        ({"source": 3}, "got {'source': 3}."),
        (at([False, True], [True, False]), "and indices from 0, got [[[False, True], [True, False]]]."),
        (at([99], [9]), "expected indices from 0 to 9 in rows of 10 tokens (-1 for none), got 9 to 99."),
    ],
)
def test_wrong_unit_locations(adapted, locations, got):
    with pytest.raises(pyreft.ReftError) as caught:
        adapted({"input_ids": IDS}, unit_locations=locations)
    assert got in str(caught.value)


def test_inputs_without_names_are_told(adapted):
    with pytest.raises(pyreft.ReftError, match=r"base: expected the inputs by their names, .*, got a Tensor"):
        adapted.generate(IDS, unit_locations=at([9], [9]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspaces": [[0]]}, "subspaces: expected .* with 1 interventions and a batch of 2, got"),
        ({"subspaces": [[[4], [0]]]}, "subspaces: expected directions from 0 to 3, got .4."),
        ({"sources": [1]}, "sources: ReFT learns its edits"),
        ({"intervene_on_prompt": False}, "intervene_on_prompt: edits begin in the prompt"),
    ],
)
def test_what_is_not_supported_says_so(adapted, arguments, message):
    with pytest.raises(pyreft.ReftError, match=message):
        adapted.generate({"input_ids": IDS}, unit_locations=at([9], [9]), **arguments)


def test_subspaces_choose_directions_by_row(model, adapted):
    both = {"sources->base": (None, [[[0, 2], [1]]])}
    _, edited = adapted({"input_ids": IDS}, unit_locations=at([9], [9]), subspaces=both, output_hidden_states=True)
    h = tiny_llama()(IDS, output_hidden_states=True).hidden_states[3][:, 9]
    (module,) = adapted.interventions.values()
    basis = module.basis()
    coordinates = (module.source(h) - h @ basis.mT) * torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    torch.testing.assert_close(edited.hidden_states[3][:, 9], h + coordinates @ basis, atol=1e-5, rtol=1e-5)
    one = {"input_ids": IDS[:1]}
    _, alone = adapted.generate(one, unit_locations=at([9]), subspaces={"base": [[[0, 2]]]}, **OPTIONS)
    beams = {**OPTIONS, "num_beams": 2}
    _, searched = adapted.generate({"input_ids": IDS}, unit_locations=at([9], [9]), subspaces=both, **beams)
    _, pair = adapted.generate({"input_ids": IDS}, unit_locations=at([9], [9]), subspaces=both, **OPTIONS)
    assert torch.equal(pair[:1], alone)
    assert torch.equal(
        adapted.generate(one, unit_locations=at([9]), subspaces={"base": [[[0, 2]]]}, **beams)[1], searched[:1]
    )
    every = adapted(input_ids=IDS, intervention_locations=[[[9]]] * 2, subspaces=[[[0, 1, 2, 3]], [None]]).logits
    torch.testing.assert_close(every, adapted(IDS, intervention_locations=[[[9]]] * 2).logits)


def test_the_original_members(model, adapted, capsys):
    assert adapted.model is model
    assert [type(module) for module in adapted.interventions.values()] == [pyreft.LoreftIntervention]
    assert adapted.count_parameters() == adapted.count_parameters(include_model=True) == 2 * 32 * 4 + 4
    assert adapted.set_device("cpu") is adapted
    assert adapted.get_device() == torch.device("cpu")
    adapted.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed == (
        "trainable intervention params: 260 || trainable model params: 0\n"
        f"model params: {tiny_llama().num_parameters():,d} || trainable%: {26000 / tiny_llama().num_parameters()}\n"
    )


def test_the_gradients_of_the_base_and_of_the_interventions(model, adapted):
    (own,) = adapted.interventions.values()
    assert set(adapted.get_trainable_parameters()) == set(own.parameters())
    adapted.enable_model_gradients()
    assert len(adapted.get_trainable_parameters()) == len(list(model.parameters()))
    adapted(IDS, labels=IDS, intervention_locations=[[[9]]] * 2).loss.backward()
    assert all(parameter.grad is not None for parameter in own.parameters())
    adapted.set_zero_grad()
    assert all(parameter.grad is None for parameter in own.parameters())
    adapted.disable_model_gradients()
    assert set(adapted.get_trainable_parameters()) == set(own.parameters())


def test_a_module_that_the_adapter_trains_is_not_the_base(model):
    config = pyreft.ReftConfig(layers=1, low_rank_dimension=2, modules_to_save=["lm_head"], intervention="loreft")
    adapted = pyreft.get_reft_model(model, config)
    trained = set(adapted.get_trainable_parameters())
    assert len(trained) == 4
    adapted.enable_model_gradients()
    assert len(adapted.get_trainable_parameters()) > 4
    adapted.disable_model_gradients()
    assert set(adapted.get_trainable_parameters()) == trained


def test_save_and_load_the_interventions(adapted, tmp_path):
    adapted.save_intervention(tmp_path, include_model=True)
    locations = [[[9]]] * 2
    expected = adapted(IDS, intervention_locations=locations).logits
    shaken(adapted)
    assert not torch.equal(adapted(IDS, intervention_locations=locations).logits, expected)
    adapted.load_intervention(tmp_path, include_model=True)
    assert torch.equal(adapted(IDS, intervention_locations=locations).logits, expected)
    assert torch.equal(
        pyreft.ReftModel.load(tmp_path, tiny_llama())(IDS, intervention_locations=locations).logits, expected
    )


def test_where_the_originals_trainers_put_a_checkpoint(adapted, tmp_path):
    adapted.save(tmp_path / "checkpoint-2")
    call = {"input_ids": IDS, "intervention_locations": [[[9]]] * 2}
    expected = adapted(**call).logits
    shaken(adapted)
    adapted.load_intervention(tmp_path / "checkpoint-2" / "intervenable_model", include_model=False)
    assert torch.equal(adapted(**call).logits, expected)
    loaded = pyreft.ReftModel.load(tmp_path / "checkpoint-2" / "intervenable_model", tiny_llama())
    assert torch.equal(loaded(**call).logits, expected)
    with pytest.raises(pyreft.ReftError, match="checkpoint-3/intervenable_model: expected an adapter's directory"):
        adapted.load_intervention(tmp_path / "checkpoint-3" / "intervenable_model")


def test_the_interventions_of_another_place(adapted, tmp_path):
    adapted.save_intervention(tmp_path)
    other = pyreft.get_reft_model(tiny_llama(), one_layer(1))
    with pytest.raises(pyreft.ReftError, match=r"expected the edits of this model, \[\(1, .* it holds \[\(2, "):
        other.load_intervention(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(pyreft.ReftError, match=r"the adapter has no adapter_model.safetensors"):
        adapted.load_intervention(tmp_path)


def test_a_trained_base_is_not_left_out_silently(adapted, tmp_path):
    adapted.enable_model_gradients()
    with pytest.raises(pyreft.ReftError, match=r"include_model: an adapter's files do not hold .*\(modules_to_save="):
        adapted.save_intervention(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapted.save_intervention(tmp_path / "adapter", include_model=False)
    adapted.unload().save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == {*dict(tiny_llama().named_parameters())}


@pytest.mark.parametrize("include_model", [True, False])
def test_a_trained_head_is_saved_and_loaded_with_the_interventions(adapted, tmp_path, include_model):
    adapted.model.lm_head.weight.requires_grad = True
    with torch.no_grad():
        adapted.model.lm_head.weight.add_(torch.randn_like(adapted.model.lm_head.weight))
    adapted.save_intervention(tmp_path, include_model=include_model)
    call = {"intervention_locations": [[[9]]] * 2}
    expected = adapted(IDS, **call).logits
    for head_is_trained in (True, False):
        again = pyreft.get_reft_model(tiny_llama(), one_layer()).eval()
        again.model.lm_head.weight.requires_grad = head_is_trained
        again.load_intervention(tmp_path, include_model=include_model)
        assert torch.equal(again(IDS, **call).logits, expected)
    assert torch.equal(pyreft.ReftModel.load(tmp_path, tiny_llama())(IDS, **call).logits, expected)


def test_the_intervention_that_was_given_is_the_one_that_is_trained(model):
    config = one_layer()
    mine = config.representations[0].intervention
    adapted = pyreft.get_reft_model(model, config)
    assert list(adapted.interventions.values()) == [mine]
    json.dumps(adapted.peft_config["default"].to_dict())


def test_a_module_around_the_model_may_switch_its_mode(adapted):
    around = torch.nn.Sequential(adapted)  # as what puts a model on several devices
    for mode in (True, False):
        assert around.train(mode)[0].training is mode
        assert all(module.training is mode for module in adapted.interventions.values())


def test_the_base_stays_trainable_if_asked(model):
    adapted = pyreft.get_reft_model(model, one_layer(), disable_model_grads=False)
    assert adapted.count_parameters(include_model=True) == 260 + model.num_parameters() - 260
    assert adapted.count_parameters() == 260


def test_save_and_load_on_the_same_base_variable(model, adapted, tmp_path):
    expected = adapted({"input_ids": IDS}, unit_locations=at([9], [8]))[1].logits
    adapted.save(save_directory=tmp_path / "one", save_to_hf_hub=False)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = pyreft.ReftModel.load(tmp_path / "one", model)
    assert torch.equal(again({"input_ids": IDS}, unit_locations=at([9], [8]))[1].logits, expected)
    with pytest.raises(pyreft.ReftError, match="were taken off its base model when another ReftModel was made"):
        adapted(IDS)
    again.save(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saving_again_into_a_full_directory_replaces_the_adapter_alone(adapted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    locations = [[[9]]] * 2
    for save in (adapted.save, adapted.save_pretrained, adapted.save_intervention):
        expected = shaken(adapted)(IDS, intervention_locations=locations).logits
        save(tmp_path)
        again = pyreft.ReftModel.load(tmp_path, tiny_llama())
        assert torch.equal(again(IDS, intervention_locations=locations).logits, expected)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_model_card_shows_how_to_load(adapted, tmp_path):
    adapted.peft_config["default"].base_model_name_or_path = "some/base"
    adapted.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "some/base"' in card
    assert 'tags: ["reft", "representation-finetuning"]' in card
    assert "loreft at the tokens" in card


@pytest.mark.parametrize("name", [None, "pocket", "smollm2"])
def test_a_stranger_can_use_what_the_model_card_shows(tmp_path, monkeypatch, capsys, name):
    """Also of a base model by a name that transformers does not know; the embedded one stands in for SmolLM2."""
    torch.manual_seed(0)
    monkeypatch.setattr(smollm2, "path", pocket.path)
    model = pocket.load()[0]
    model.name_or_path = name or model.name_or_path
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(layers=[2], low_rank_dimension=2, intervention="loreft"))
    adapted.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert f"base = {name or 'pocket'}.path()" in card
    assert ("pip install pyreft[smollm2]" in card) == (name == "smollm2")
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert len(capsys.readouterr().out.strip()) > 2


def test_upload_to_the_hub_up_to_the_network(adapted, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def no_network(self, method, url, *args, **kwargs):
        calls.append((method, str(url)))
        raise ConnectionError("no network in tests")

    client = huggingface_hub.get_session()
    monkeypatch.setattr(type(client), "request", no_network)
    monkeypatch.setattr(type(client), "send", lambda self, request, **_: no_network(self, request.method, request.url))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(Exception, match="no network in tests"):
        adapted.save(tmp_path, save_to_hf_hub=True, hf_repo_name="someone/my-reft")
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert calls
    assert "api/repos/create" in calls[0][1]


def test_an_adapter_from_the_hub_up_to_the_network(adapted, tmp_path, monkeypatch):
    adapted.save(tmp_path / "downloaded")
    asked = {}

    def downloaded(repo, local_dir=None):
        asked.update(repo=repo, local_dir=local_dir)
        return str(tmp_path / "downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    again = pyreft.ReftModel.load("someone/my-reft", tiny_llama(), str(tmp_path / "kept"), from_huggingface_hub=True)
    assert asked == {"repo": "someone/my-reft", "local_dir": str(tmp_path / "kept")}
    call = {"intervention_locations": [[[9]]] * 2}
    assert torch.equal(again(IDS, **call).logits, adapted(IDS, **call).logits)


# -- files that cannot be used ------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_adapter(adapted, tmp_path, monkeypatch):
    adapted.save(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    shaken(adapted)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    for directory in ("adapter", "new"):
        with pytest.raises(OSError, match="No space left"):
            adapted.save(tmp_path / directory)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def narrow(path):
    save_file({name: tensor[..., :2].contiguous() for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", truncate, "is damaged or was cut short"),
        ("adapter_model.safetensors", drop_a_tensor, "1 tensors are missing"),
        ("adapter_model.safetensors", narrow, "has the shape"),
        ("adapter_model.safetensors", os.unlink, "the adapter has no adapter_model.safetensors"),
        ("adapter_config.json", lambda path: path.write_text('{"peft'), "is damaged, it is not JSON"),
        ("adapter_config.json", lambda path: path.write_text('{"peft_type": "LORA"}'), "one of the type 'LORA'"),
        ("adapter_config.json", os.unlink, "expected an adapter's directory, found no adapter_config.json"),
    ],
)
def test_damaged_files(adapted, tmp_path, name, damage, message):
    adapted.save(tmp_path)
    damage(tmp_path / name)
    fresh = tiny_llama()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.ReftModel.load(tmp_path, fresh)
    assert fresh.state_dict().keys() == before.keys()  # the model is as it was


def test_an_unknown_class_in_a_file_is_not_imported(adapted, tmp_path):
    adapted.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["representations"][0]["intervention"] = "os.system"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(pyreft.ReftError, match="intervention: expected one of loreft"):
        pyreft.ReftModel.load(tmp_path, tiny_llama())


def test_edits_on_another_device_say_so(adapted):
    adapted.set_device("meta", set_model=False)
    with pytest.raises(pyreft.ReftError, match="The edits of adapter 'default' are on meta, the states on cpu; move"):
        adapted({"input_ids": IDS}, unit_locations=at([9], [9]))


def test_weights_are_swapped_in_place(adapted, tmp_path):
    other = pyreft.get_reft_model(tiny_llama(), one_layer())
    torch.manual_seed(7)
    shaken(other)
    call = {"input_ids": IDS, "intervention_locations": [[[9]]] * 2}
    expected = other(**call).logits
    other.save(tmp_path)
    before = adapted(**call).logits  # R is computed, and kept
    parameters = [parameter.data_ptr() for parameter in adapted.parameters()]
    adapted.load_intervention(tmp_path)
    assert torch.equal(adapted(**call).logits, expected)
    assert not torch.equal(before, expected)
    assert parameters == [parameter.data_ptr() for parameter in adapted.parameters()]


@pytest.mark.parametrize("name", ["a", "def", "layers", "1"])
def test_an_adapter_whose_name_is_a_part_of_other_paths(adapted, tmp_path, name):
    """Of what PEFT counts as missing, such as the tensors of the first adapter, nothing is this one's."""
    adapted.save_pretrained(tmp_path)
    loaded = pyreft.ReftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path, name)
    loaded.set_adapter(name)
    ids = torch.randint(3, 96, (1, 8))
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)


def test_adapters_whose_names_are_numbers_of_layers(tmp_path):
    config = pyreft.ReftConfig(positions="l2")
    model = pyreft.get_reft_model(tiny_llama(), config, adapter_name="1")
    for name in ("2", "weight"):
        model.add_adapter(name, pyreft.ReftConfig(positions="l2"))
    shaken(model).save_pretrained(tmp_path)
    ids = torch.randint(3, 96, (1, 8))
    for name in model.peft_config:
        model.set_adapter(name)
        loaded = pyreft.ReftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.delete_adapter("weight")
    given = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ReftError, match=r"PEFT leaves out . tensors of '1', such as .*Give that one another name"):
        peft.get_peft_model_state_dict(model, given, adapter_name="1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (name, f"PEFT or torch calls something else '{name}'; give another")
        for name in ("model", "base_layer", "training")
    ]
    + [
        (name, "adapter_name: an adapter is saved in .* names none within that where it is saved")
        for name in ("..", "a/../../b", "/tmp/a", "", "./")
    ],
)
def test_a_name_under_which_nothing_would_be_saved(adapted, name, message):
    with pytest.raises(ReftError, match=message):
        adapted.add_adapter(name, pyreft.ReftConfig())
    assert list(adapted.peft_config) == ["default"]
    with pytest.raises(ReftError, match=message):
        pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(), adapter_name=name)


def test_what_is_set_for_generation_and_for_the_loss_is_the_base_models():
    """Seq2SeqTrainer sets the one, transformers documents the other."""
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(layers=[1], positions="l1")).eval()
    adapted.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert adapted.generate(input_ids=IDS).shape[1] == IDS.shape[1] + 3
    adapted.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert adapted(input_ids=IDS, labels=IDS).loss.item() == 7
    assert adapted.get_base_model().generation_config is adapted.generation_config
    assert copy.deepcopy(adapted).generation_config.max_new_tokens == 3
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    plain = pyreft.get_reft_model(
        network, pyreft.ReftConfig(representations={"component": "0.output", "intervention": "bias"})
    )
    assert not hasattr(plain, "generation_config")


@pytest.mark.parametrize("change", [{"act_fn": "relu"}, {"positions": "f1"}, {"intervention": "lobireft"}])
def test_other_edits_are_not_loaded_into_an_adapter_that_is_there(tmp_path, change):
    """Their tensors alone would fit; what they mean is in the config."""
    settings = {"layers": [2], "positions": "l1", "intervention": "consreft", "low_rank_dimension": 2}
    pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**settings | change)).save(tmp_path)
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(**settings)).eval()
    before = adapted(IDS).logits
    with pytest.raises(pyreft.ReftError, match=r"expected the edits of this model, .*; it holds "):
        adapted.load_adapter(tmp_path, "default")
    assert torch.equal(adapted(IDS).logits, before)
    adapted.load_adapter(tmp_path, "another")  # under a name of its own it is what it was


def test_what_the_hub_refuses_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ReftError, match=r"^no adapter 'someone/none' could be read from the hub: ."):
        pyreft.ReftModel.load("someone/none", tiny_llama(), from_huggingface_hub=True)
    with pytest.raises(ReftError, match=r"^no adapter 'some one' could be read from the hub: Repo id must"):
        pyreft.ReftModel.load("some one", tiny_llama(), from_huggingface_hub=True)
    adapted = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(layers=[1], positions="l1"))
    with pytest.raises(ReftError, match=r"^the adapter is in .*, but was not uploaded to 'a/b': Cannot reach"):
        adapted.save(tmp_path, save_to_hf_hub=True, hf_repo_name="a/b")
    assert (tmp_path / "adapter_config.json").exists()
