import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import pyreft
from conftest import tiny_llama
from pyreft.tuner.representation import Representation

READY = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2)
TANH = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2, act_fn="tanh")


def test_what_is_edited_if_nothing_is_said():
    def said(**settings):
        config = pyreft.ReftConfig(**settings)
        return config.intervention, config.low_rank_dimension, config.component, config.positions, config.dropout

    v_o = ["value_output", "attention_output"]
    assert said() == ("lora", 1, v_o, None, 0.3)
    assert said(layers=[1], positions="l4") == ("lora", 1, v_o, "l4", 0.3)
    assert said(dropout=0.0) == ("lora", 1, v_o, None, 0.0)
    assert said(intervention="lora", low_rank_dimension=3) == ("lora", 3, v_o, None, 0.0)
    assert said(intervention="loreft") == ("loreft", 8, "block_output", None, 0.0)
    assert said(component="mlp_output") == ("loreft", 8, "mlp_output", None, 0.0)
    assert said(low_rank_dimension=4) == ("loreft", 4, "block_output", None, 0.0)
    assert said(representations={"layer": 1})[4] == 0.0
    assert said(intervention="red")[1:3] == (None, "block_output")


def test_rules_that_are_not_said_are_filled_in_by_the_model(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = BertConfig(vocab_size=60, pad_token_id=0, **sizes)
    for model, rule in [
        (tiny_llama(), "l16"),
        (tiny_llama().model, "all"),
        (LlamaForSequenceClassification(LlamaConfig(vocab_size=60, **sizes)), "all"),
        (BertForSequenceClassification(shape), "all"),
        (BertForTokenClassification(shape), "all"),
    ]:
        config = pyreft.ReftConfig()
        adapted = get_peft_model(model, config)
        assert config.positions == rule
        adapted.save_pretrained(tmp_path / "adapter")
        assert pyreft.ReftConfig.from_pretrained(tmp_path / "adapter").positions == rule

    config = pyreft.ReftConfig(positions="l16")
    get_peft_model(BertModel(shape), config)
    assert config.positions == "l16"
    config = pyreft.ReftConfig(representations={"layer": 1})
    get_peft_model(BertModel(shape), config)
    assert config.positions is None
    assert config.expand(2)[0].rule() is None
    config = pyreft.ReftConfig(layers=[7])
    with pytest.raises(pyreft.ReftError):
        get_peft_model(BertModel(shape), config)
    assert config.positions is None


def test_one_config_for_two_kinds_of_model_has_the_rule_of_each():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape, config = LlamaConfig(vocab_size=60, **sizes), pyreft.ReftConfig()
    judge = get_peft_model(LlamaForSequenceClassification(shape), config)
    policy = get_peft_model(LlamaForCausalLM(shape), config)
    other = get_peft_model(LlamaForSequenceClassification(shape), config)
    found = [model.peft_config["default"].positions for model in (judge, policy, other)]
    assert found == ["all", "l16", "all"]
    assert [model.base_model.edits.rules["default"][0].whole for model in (judge, policy)] == ["all", None]


def test_by_default_every_token_of_a_classifiers_row_is_edited():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=60, pad_token_id=0, **sizes)).eval()
    ids = torch.randint(1, 60, (2, 24))
    before = model(input_ids=ids).last_hidden_state
    config = pyreft.ReftConfig(layers=[1], component="block_output", low_rank_dimension=2)
    adapted = get_peft_model(model, config).eval()
    after = adapted(input_ids=ids).last_hidden_state
    assert bool((after != before).any(-1).all())


def test_a_file_that_says_nothing_of_dropout_has_none():
    written = pyreft.ReftConfig().to_dict()
    assert pyreft.ReftConfig(**written).dropout == 0.3
    del written["dropout"]
    assert pyreft.ReftConfig(**written).dropout == 0.0


def test_a_path_is_one_place_in_whatever_layers():
    config = pyreft.ReftConfig(component=["model.layers[1].mlp.output", "block_output"])
    assert [(place.layer, place.component) for place in config.expand(2)] == [
        (None, "model.layers[1].mlp.output"),
        (0, "block_output"),
        (1, "block_output"),
    ]
    model = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(component="model.layers[1].mlp.output"))
    assert len(model.interventions) == 1


def test_places_that_name_no_formula_are_the_originals():
    config = pyreft.ReftConfig(
        representations=[{"layer": 1}, {"layer": 1, "intervention": "lora"}, {"layer": 2, "intervention": "bias"}]
    )
    found = [(place.intervention, place.component, place.low_rank_dimension) for place in config.representations]
    lora = [("lora", component, 1) for component in ("value_output", "attention_output")]
    assert found == [("loreft", "block_output", 8), *lora, ("bias", "block_output", None)]
    ranked = pyreft.ReftConfig(
        representations=[{"layer": 1}, {"layer": 1, "intervention": "lora"}], low_rank_dimension=5
    )
    assert {place.low_rank_dimension for place in ranked.representations} == {5}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", "all"), (3, [3]), ([1, 2], [1, 2]), ((0,), [0]), ("3;9;18", [3, 9, 18]), ("1, 2", [1, 2])],
)
def test_layers(layers, expected):
    assert pyreft.ReftConfig(layers=layers, intervention="loreft").layers == expected


def test_layers_as_peft_calls_them():
    assert pyreft.ReftConfig(layers_to_transform=[1, 2], intervention="loreft").layers == [1, 2]
    assert pyreft.ReftConfig(layers_to_transform=0, intervention="loreft").layers == [0]
    with pytest.raises(pyreft.ReftError, match="layers: layers are 3 and layers_to_transform 4; give one"):
        pyreft.ReftConfig(layers=3, layers_to_transform=4, intervention="loreft")
    with pytest.raises(pyreft.ReftError, match="each of the representations names its own layer"):
        pyreft.ReftConfig(representations={"layer": 1}, layers_to_transform=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude_modules": ["layers.3"]}, "exclude_modules: ReFT calls it otherwise: give layers and component"),
        ({"target_modules": ["q_proj"]}, "target_modules: .* give component, or representations"),
        ({"r": 8}, "r: .* give low_rank_dimension"),
        ({"lora_alpha": 16}, "lora_alpha: .* give intervention_kwargs="),
        ({"lora_dropout": 0.1}, "lora_dropout: .* give dropout"),
        ({"intervention_types": pyreft.NoreftIntervention}, "intervention_types: .* give intervention"),
    ],
)
def test_what_peft_calls_otherwise(settings, message):
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.ReftConfig(**settings)


@pytest.mark.parametrize("intervention", ["loreft", "noreft", "direft", "nodireft", "lobireft", "red", "road", "lora"])
@pytest.mark.parametrize("listed", [True, False])
def test_edits_that_begin_at_nothing(model, intervention, listed):
    place = {"component": "mlp_output", "positions": "all", "intervention": intervention}
    places = {"representations": [{**place, "layer": layer} for layer in (1, 2)]} if listed else place | {"layers": [1]}
    config = pyreft.ReftConfig(**places, init_weights=True)
    assert pyreft.ReftConfig(**json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(pyreft.get_reft_model(model, config).eval()(ids).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"representations": {"layer": 1, "intervention": READY}, "init_weights": True},
            "as it was made; make it with",
        ),
        ({"intervention": "red", "init_weights": False}, "init_weights: RedIntervention always begins at h' = h"),
        ({"init_weights": "yes"}, "init_weights: expected"),
        ({"intervention": "consreft", "init_weights": True}, "init: ConsreftIntervention is h' = h for no parameters"),
        ({"intervention": "reftr1", "init_weights": True}, "init: the intervention 'reftr1' does not take it"),
    ],
)
def test_where_an_edit_cannot_begin(model, settings, message):
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.get_reft_model(model, pyreft.ReftConfig(**settings))


def test_places_in_their_order():
    tied = pyreft.ReftConfig(layers=[1, 3], positions="f2+l3", intervention="loreft").expand(4)
    assert [(place.layer, place.side) for place in tied] == [(1, None), (3, None)]
    untied = pyreft.ReftConfig(layers="all", positions="f2+l3", share_weights=False, intervention="loreft").expand(2)
    assert [(place.layer, place.side) for place in untied] == [
        (0, "prefix"),
        (1, "prefix"),
        (0, "suffix"),
        (1, "suffix"),
    ]
    assert len(pyreft.ReftConfig(positions="l3", share_weights=False, intervention="loreft").expand(2)) == 2


def test_entries_take_what_they_do_not_say_from_the_config():
    places = [{"layer": 0}, {"layer": 1, "positions": "f1", "low_rank_dimension": 2, "intervention": "direft"}]
    config = pyreft.ReftConfig(representations=places, positions="l2", low_rank_dimension=4, dropout=0.1)
    first, second = config.expand(8)
    assert (first.positions, first.low_rank_dimension, first.intervention, first.dropout) == ("l2", 4, "loreft", 0.1)
    assert (second.positions, second.low_rank_dimension, second.intervention) == ("f1", 2, "direft")


def second_token(prompt, input_ids):
    return prompt & (prompt.long().cumsum(-1) == 2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": [1], "positions": "l1", "act_fn": "relu"},
        {"representations": [{"layer": 1, "component": "mlp_output"}], "intervention": "noreft", "add_bias": True},
        {"representations": [{"layer": 1}], "intervention": pyreft.NodireftIntervention, "positions": second_token},
        {"representations": [{"layer": 1, "positions": None, "act_fn": None}], "positions": "l1", "act_fn": "relu"},
        {"representations": [{"layer": 1}, {"layer": 2}], "intervention": READY},
        {"intervention": "red"},
    ],
)
def test_to_dict_and_back(settings):
    config = pyreft.ReftConfig(**settings)
    plain = json.loads(json.dumps(config.to_dict()))
    assert pyreft.ReftConfig(**plain).to_dict() == config.to_dict()
    places = [place.to_dict() for place in config.expand(3)]
    assert [place.to_dict() for place in pyreft.ReftConfig(**plain).expand(3)] == places


def test_beside_representations_nothing_says_the_same():
    written = pyreft.ReftConfig(representations={"layer": 1, "low_rank_dimension": 2}, positions="l1").to_dict()
    assert not written.keys() & {"layers", "positions", "component", "intervention", "low_rank_dimension", "dropout"}
    assert written["representations"][0]["positions"] == "l1"


def test_a_rank_for_a_formula_without_one():
    assert pyreft.ReftConfig(intervention="red").low_rank_dimension is None
    with pytest.raises(pyreft.ReftError, match="low_rank_dimension: the intervention 'red' does not take it"):
        pyreft.ReftConfig(intervention="red", low_rank_dimension=8).expand(1)[0].make(16)


def test_keys_of_the_original_that_go_without_saying():
    place = {"layer": "1", "component": "block_output", "unit": "pos", "max_number_of_units": 1}
    assert pyreft.ReftConfig(representations=[place]).expand(0)[0].layer == 1
    for path in ("model.layers[1].mlp.output", "lm_head.input"):  # the original's users give the layer, too
        pyreft.ReftConfig(representations=[place | {"component": path}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "some"}, "layers: expected 'all', a number, a list, or text such as '3;9;18', got 'some'."),
        ({"layers": []}, "layers: expected"),
        ({"layers": [1, 1]}, "a layer stands twice in [1, 1]"),
        ({"layers": [1], "representations": {"layer": 1}}, "layers: each of the representations names its own layer"),
        ({"positions": "lats"}, "positions: expected f<n>"),
        ({"low_rank_dimension": "4"}, "low_rank_dimension: expected a whole number, got '4'."),
        ({"intervention": "loreff"}, "Did you mean 'loreft'?"),
        ({"representations": []}, "expected at least one edited place"),
        ({"representations": {"layers": 1}}, "got 'layers'. Did you mean 'layer'?"),
        ({"representations": {"layer": 1, "unit": "w"}}, "expected the unit 'pos', or the number of a head, got 'w'"),
        (
            {"representations": {"layer": 1, "act_fn": "relu", "intervention": TANH}},
            "act_fn is relu beside an intervention made with tanh",
        ),
        (
            {"representations": [{"layer": 1}] * 2, "intervention_types": ["loreft"]},
            "expected 2, one for each entry",
        ),
        ({"representations": {"layer": "all"}}, "layer: expected the number of one layer, got 'all'; write a"),
        ({"representations": {"layer": "1;2"}}, "layer: expected the number of one layer, got '1;2'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(pyreft.ReftError) as caught:
        pyreft.ReftConfig(**settings)
    assert message in str(caught.value)


def test_a_path_of_another_layer():
    expected = r"layer: expected that of the path 'model.layers\[12\].output', got 1; give 12, or the path alone"
    with pytest.raises(pyreft.ReftError, match=expected):
        pyreft.ReftConfig(layers=[1], component="model.layers[12].output").expand(16)


def test_a_ready_intervention_of_another_width():
    with pytest.raises(pyreft.ReftError, match="is 16 wide, the intervention given for it 8"):
        Representation(layer=1, intervention=READY).make(16)
