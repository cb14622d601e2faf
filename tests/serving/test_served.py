"""What an engine reads of a directory, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyreft
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.places.components import find_site
from pyreft.positions import Positions
from pyreft.serving.bank import Bank
from pyreft.serving.served import read_adapter
from pyreft.serving.tokens import Place, plan
from pyreft.tuner import reft_layers
from served import save

WIDTH = 192


def edited(adapter, h, prompt):
    """The states `[tokens, d]` of a prompt behind each place, edited there alone."""
    bank = Bank(slots=2, rank=8, width=WIDTH)
    bank.write(1, adapter.edits())
    step = plan({0: adapter.row(1, prompt)}, [0, prompt], [0])
    found = {}
    for place in adapter.pattern:
        out = h.clone()
        for tile in step.at(place).tiles():
            out[tile.at] += bank.delta(place, tile, h[tile.at])
        found[place] = out
    return found


def test_the_weights_are_those_of_the_interventions(tmp_path):
    representations = [
        {"layer": 2, "component": "block_output", "positions": "f2", "intervention": "loreft"},
        {"layer": 3, "component": "block_input", "positions": "l3", "intervention": "red", "low_rank_dimension": None},
        {"layer": 2, "component": "block_output", "positions": "prompt", "intervention": "nodireft", "act_fn": "gelu"},
        {"layer": 0, "component": "block_input", "positions": "f2", "intervention": "consreft"},
    ]
    save(tmp_path, representations=representations)
    adapter = read_adapter(tmp_path)
    # what a block returns is edited before what the next one takes
    assert dict(adapter.pattern) == {Place(2, 0): 0, Place(2, 1): 1, Place(-1, 0): 0, Place(2, 2): 2}
    assert adapter.rules == tuple(map(Positions.parse, ("f2", "prompt", "l3")))
    assert adapter.rank == 4
    model = pyreft.ReftModel.from_pretrained(pocket.load()[0], str(tmp_path)).eval()
    modules = {(layer.side, index): module for layer in reft_layers(model) for index, module in layer.of("default")}
    h = torch.randn(6, WIDTH)
    found = edited(adapter, h, 6)
    for place, side, index, tokens in (
        (Place(2, 0), "output", 0, slice(0, 2)),
        (Place(2, 1), "output", 2, slice(0, 6)),
        (Place(2, 2), "input", 1, slice(3, 6)),
        (Place(-1, 0), "input", 3, slice(0, 2)),
    ):
        expected = h.clone()
        expected[tokens] = modules[side, index](h[tokens])
        torch.testing.assert_close(found[place], expected)


def test_what_is_edited_inside_of_blocks_is_found_by_the_model(tmp_path):
    model = pocket.load()[0]
    directory = save(tmp_path, intervention="lora", positions="l3", layers=[1, 4], intervention_kwargs={"alpha": 6})
    adapter = read_adapter(directory)
    assert adapter.parts_inside == ["value_output", "attention_output"]
    assert adapter.edits() == {}  # which is for a check of the file alone

    def site(part, layer):
        return find_site(model, part, layer, linear=True)

    edits = adapter.edits(site)
    assert set(edits) == {Place(layer, 0, part) for layer in (1, 4) for part in adapter.parts_inside}
    own = pyreft.ReftModel.from_pretrained(model, str(directory)).eval()
    at = own.get_base_model().model.layers[4].self_attn.v_proj
    module = at.reft_output["default"][0]
    x, h = torch.randn(5, module.input_dim), torch.randn(5, module.embed_dim)
    edit = edits[Place(4, 0, "value_output")]
    torch.testing.assert_close(h + (x @ edit.a.T + edit.b) @ edit.out, module(h, x=x).detach())

    tensors = load_file(directory / "adapter_model.safetensors")
    key = next(name for name in tensors if "v_proj" in name and "A.weight" in name)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, directory / "adapter_model.safetensors")
    read_adapter(directory).edits()  # how wide it is only the model knows
    with pytest.raises(ReftError, match=r"the edit of layer 1 has .*191.* asks for .*192"):
        read_adapter(directory).edits(site)
    save_file(
        {name: values for name, values in tensors.items() if name != key}, directory / "adapter_model.safetensors"
    )
    with pytest.raises(ReftError, match=r"expected A of the ranks \[4, 4, 4, 4\] and a B for each"):
        read_adapter(directory).edits()
    rest = {name: values for name, values in tensors.items() if "layers.1.self_attn.v_proj" not in name}
    save_file(rest, directory / "adapter_model.safetensors")
    with pytest.raises(ReftError, match="expected 4 edits inside of blocks, got 3"):
        read_adapter(directory).edits()


def test_a_prefix_and_a_suffix_of_their_own_stand_one_after_the_other(tmp_path):
    adapter = read_adapter(save(tmp_path, positions="f3+l3", share_weights=False, layers=[1, 4]))
    assert sorted(adapter.pattern) == [Place(1, 0), Place(1, 1), Place(4, 0), Place(4, 1)]
    assert [(rule.first, rule.last, rule.side) for rule in adapter.rules] == [(3, 3, "prefix"), (3, 3, "suffix")]
    assert adapter.row(0, 4).spans == (((0, 2),), ((2, 4),))


def test_the_digest_is_that_of_config_and_weights(tmp_path):
    one = read_adapter(save(tmp_path / "one", seed=1)).digest
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert read_adapter(tmp_path / "two").digest == one
    assert read_adapter(save(tmp_path / "three", seed=2)).digest != one
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps({**config, "positions": "l3"}))
    assert read_adapter(tmp_path / "two").digest != one


def changed(path, **values):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intervention": "reftr1", "low_rank_dimension": None}, "intervention: 'reftr1' cannot be served"),
        (
            {"intervention": "lora", "component": ["cross_attention_output"]},
            "component: 'cross_attention_output' of 'lora' cannot be served, only query_output, .*mlp_output",
        ),
        (
            {"component": "mlp_output"},
            "component: 'mlp_output' of 'loreft' cannot be served, only block_input, block_output",
        ),
        ({"act_fn": "prelu"}, "act_fn: 'prelu' has parameters of its own|no activation is called 'prelu'"),
        ({"layers": [99]}, "layer: expected one of 0 to 6, got 99"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*'lm_head'.* cannot be served"),
        ({"base_model_shape": None}, "does not say what base model"),
        ({"peft_type": "LORA"}, "expected an adapter of representation finetuning, this is one of the type 'LORA'"),
        ({"representations": [{"layer": 1}], "positions": None}, "positions: its locations come with each call"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path, values, message):
    save(tmp_path, layers=[1])
    if "representations" in values:
        values = {**values, "layers": "all"}
    with pytest.raises(ReftError, match=message):
        read_adapter(changed(tmp_path, **values))


def test_files_that_do_not_fit_are_refused(tmp_path):
    adapter = read_adapter(save(tmp_path, layers=[1, 2]))
    weights = tmp_path / "adapter_model.safetensors"
    good, tensors = weights.read_bytes(), load_file(weights)
    first = next(iter(tensors))
    for change, message in (
        ({first: tensors[first] / 0}, "not finite"),
        ({"base_model.model.lm_head.weight": torch.ones(2)}, "lm_head.weight is not known"),
        ({first.replace(".1.", ".3."): tensors[first].clone()}, "0 edits are missing, 1 are not known"),
        ({first: torch.ones(3, 3)}, "has .*3, 3.*its config asks for"),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(ReftError, match=message):
            Bank(slots=1, rank=8, width=WIDTH).write(0, adapter.edits())
    weights.write_bytes(good[:-10])
    with pytest.raises(ReftError, match="damaged or was cut short"):
        adapter.edits()
    weights.unlink()
    with pytest.raises(ReftError, match=r"has no adapter_model\.safetensors"):
        read_adapter(tmp_path)
