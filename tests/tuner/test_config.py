import json

import pytest

import pyreft
from pyreft.tuner.representation import Representation


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", "all"), (3, [3]), ([1, 2], [1, 2]), ((0,), [0]), ("3;9;18", [3, 9, 18]), ("1, 2", [1, 2])],
)
def test_layers(layers, expected):
    assert pyreft.ReftConfig(layers=layers).layers == expected


def test_places_in_their_order():
    tied = pyreft.ReftConfig(layers=[1, 3], positions="f2+l3").expand(4)
    assert [(place.layer, place.side) for place in tied] == [(1, None), (3, None)]
    untied = pyreft.ReftConfig(layers="all", positions="f2+l3", share_weights=False).expand(2)
    assert [(place.layer, place.side) for place in untied] == [
        (0, "prefix"),
        (1, "prefix"),
        (0, "suffix"),
        (1, "suffix"),
    ]
    assert len(pyreft.ReftConfig(positions="l3", share_weights=False).expand(2)) == 2


def test_entries_take_what_they_do_not_say_from_the_config():
    places = [{"layer": 0}, {"layer": 1, "positions": "f1", "low_rank_dimension": 2, "intervention": "direft"}]
    config = pyreft.ReftConfig(representations=places, positions="l2", low_rank_dimension=4, dropout=0.1)
    first, second = config.expand(8)
    assert (first.positions, first.low_rank_dimension, first.intervention, first.dropout) == ("l2", 4, "loreft", 0.1)
    assert (second.positions, second.low_rank_dimension, second.intervention) == ("f1", 2, "direft")


def second_token(prompt, input_ids):
    return prompt & (prompt.long().cumsum(-1) == 2)


READY = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2)
TANH = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2, act_fn="tanh")


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
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(pyreft.ReftError) as caught:
        pyreft.ReftConfig(**settings)
    assert message in str(caught.value)


def test_a_ready_intervention_of_another_width():
    with pytest.raises(pyreft.ReftError, match="is 16 wide, the intervention given for it 8"):
        Representation(layer=1, intervention=READY).make(16)
