"""What may be tried: it fits the model, the data and the number of parameters; what nobody has tuned comes first."""

import random

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

import pyreft
from conftest import tiny_llama
from pyreft.jobs.methods import count, make_config
from pyreft.jobs.settings import TrainingJob
from pyreft.tuning.space import Space, find_space

ROWS = [{"labels": [-100] * 20 + [5, 6]}] * 80


def drawn(space, number):
    """Random points, each with the numbers that Optuna would draw."""
    source = random.Random(number)
    for _ in range(number):
        params = {name: source.choice([*getattr(space, name)]) for name in ("positions", "dropout")}
        params |= {"edit": source.choice([*space.edits]), "layers": source.choice([*space.layers])}
        params |= {"rank": source.random(), "lr": source.uniform(*space.lr), "epochs": space.epochs[0]}
        if (point := space.to_point(params)) is not None:
            yield point


def test_what_nobody_has_tuned_comes_first(model):
    space = find_space(model, TrainingJob(), ROWS)
    settings = space.settings(space.starts[0])
    assert make_config(TrainingJob(**settings)).to_dict() == make_config(TrainingJob()).to_dict()
    assert (settings["lr"], settings["epochs"]) == (8e-3, TrainingJob.epochs)
    assert set(space.starts[0]) == set(Space.NAMES)


@pytest.mark.parametrize("most", [None, 3000, 400])
def test_no_point_has_more_parameters_than_it_may(most):
    model = tiny_llama()
    space = find_space(model, TrainingJob(), ROWS, most=most)
    points = [*space.starts, *drawn(space, 20)]
    assert len(points) > 5
    for point in points:
        adapted = pyreft.get_reft_model(model, make_config(TrainingJob(**space.settings(point))))
        assert count(adapted) == space.count(point)
        assert most is None or space.count(point) <= most


def test_a_rank_as_a_share_comes_back(model):
    space = find_space(model, TrainingJob(), ROWS, most=3000)
    for point in drawn(space, 40):
        assert space.to_point(space.to_params(point)) == point


def test_no_edit_is_so_small(model):
    with pytest.raises(
        pyreft.ReftError, match=r"^parameters: no edit .* so few parameters: got 50, the smallest has 6\d"
    ):
        find_space(model, TrainingJob(), ROWS, most=50)


def test_what_is_given_stays(model):
    job = TrainingJob(intervention="red", layers="1;2", positions="f3+l3", dropout=0.0, lr=0.3, epochs=0.5)
    space = find_space(model, job, ROWS, given=("intervention", "layers", "positions", "dropout", "lr", "epochs"))
    for point in (*space.starts, *drawn(space, 5)):
        assert space.settings(point) == {
            "intervention": "red",
            "component": "block_output",
            "layers": "1;2",
            "positions": "f3+l3",
            "dropout": 0.0,
            "lr": pytest.approx(0.3),
            "epochs": 0.5,
        }


def test_a_component_decides_the_formulas(model):
    space = find_space(model, TrainingJob(intervention="lora"), ROWS, given=("intervention",))
    assert {settings["intervention"] for settings in space.edits.values()} == {"lora"}
    assert len(space.edits) == 3


def test_rules_that_a_short_prompt_cannot_tell_apart_are_left_out(model):
    space = find_space(model, TrainingJob(), [{"labels": [-100] * 10 + [5]}] * 20)
    assert space.positions == ("l16", "l1", "l4", "prompt")
    assert "l64" in find_space(model, TrainingJob(), [{"labels": [-100] * 90 + [5]}] * 20).positions


def test_choices_of_layers_differ():
    assert find_space(tiny_llama(num_hidden_layers=1), TrainingJob(), ROWS).layers == {"all": "all"}
    chosen = find_space(tiny_llama(), TrainingJob(), ROWS).layers
    assert len(set(chosen.values())) == len(chosen) > 3


def test_edits_that_a_model_does_not_have_are_left_out():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    space = find_space(gpt2, TrainingJob(), ROWS)
    assert "loreft at block_output" in space.edits
    for point in drawn(space, 20):
        pyreft.get_reft_model(gpt2, make_config(TrainingJob(**space.settings(point))))


def test_many_examples_need_few_epochs(model):
    job = TrainingJob(batch_size=1)
    assert find_space(model, job, ROWS * 50).epochs == (1, 10)
    assert find_space(model, job, ROWS[:10]).epochs == (5, 80)
