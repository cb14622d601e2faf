"""Continuous batching generates what `generate` does for each prompt alone, and says no edited prompt's keys twice."""

import dataclasses

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import pyreft
from conftest import shaken, tiny_llama

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def many():
    """Prompts of many lengths, some with the same beginning."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 3, 21, 1, 14)]
    return [*rows, rows[2][:17] + [5, 6], rows[2]]


def small_blocks(**settings):
    """As many blocks as 512 tokens fill; their size has another name in earlier versions of transformers."""
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    size = "page_size" if "page_size" in names else "block_size"
    return ContinuousBatchingConfig(**{size: 8, "num_blocks": 64} | settings)


def alone(model, prompts):
    return [model.generate(input_ids=torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in prompts]


def together(model, prompts, **settings):
    """Small blocks, and rows so short that prompts come in chunks beside others that are being answered."""
    config = small_blocks(**{"max_batch_tokens": 11} | settings)
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=config,
        warmup=False,
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [found[tuple(row)] for row in prompts]


@pytest.mark.parametrize(
    ("rule", "formula"),
    [("f2+l2", "loreft"), ("l1", "loreft"), ("prompt", "loreft"), ("all", "loreft"), ("l3", "lora")],
)
def test_it_generates_what_each_prompt_does_alone(many, rule, formula):
    config = pyreft.ReftConfig(positions=rule, low_rank_dimension=4, intervention=formula)
    model = shaken(pyreft.get_reft_model(tiny_llama(), config))
    expected = alone(model, many)
    with model.disable_adapter():
        plain = alone(model, many)
        assert together(model, many) == plain
    assert expected != plain
    assert together(model, many) == expected
    assert together(model, many, max_batch_tokens=64) == expected


def test_a_formula_over_the_tokens_of_a_row_sees_those_of_one_request(many):
    """The requests that are computed in one row would change each other's answers."""
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="prompt", intervention="reftr1")))
    model.set_strength("default", 20.0)
    assert together(model, many, max_batch_tokens=128) == alone(model, many)


def test_a_rule_of_ones_own_sees_the_whole_prompt(many):
    def after_a_large_id(prompt, input_ids):
        return prompt & (input_ids.roll(1, -1) > 48) & (prompt.cumsum(-1) > 1)

    config = pyreft.ReftConfig(positions=after_a_large_id, low_rank_dimension=4, intervention="loreft")
    model = shaken(pyreft.get_reft_model(tiny_llama(), config))
    with model.disable_adapter():
        plain = alone(model, many)
    assert plain != together(model, many)
    assert together(model, many) == alone(model, many)


def test_another_adapter_finds_no_keys_of_the_first(many):
    """The manager and its cache live on, and the adapter is another."""
    model = pyreft.get_reft_model(
        tiny_llama(), pyreft.ReftConfig(positions="f4", low_rank_dimension=4, intervention="loreft")
    )
    model.add_adapter("other", pyreft.ReftConfig(positions="l2", intervention="red"))
    shaken(model)
    results = []
    settings = {"generation_config": GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0)}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        outputs = model.generate_batch(
            inputs=many,
            continuous_batching_config=small_blocks(max_batch_tokens=32),
            persistent_manager=True,
            warmup=False,
            **settings,
        )
        found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        results.append([found[tuple(row)] for row in many])
        assert results[-1] == alone(model, many)
    assert results[0] == results[2] != results[1]
    model.get_base_model().destroy_cached_continuous_batching_manager()


def test_a_manager_from_before_the_adapter_is_refused(many):
    base = tiny_llama()
    config = small_blocks(max_batch_tokens=32)
    settings = {"generation_config": GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0), "warmup": False}
    base.generate_batch(inputs=many, continuous_batching_config=config, persistent_manager=True, **settings)
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(positions="l1", intervention="loreft"))
    with pytest.raises(pyreft.ReftError, match="keeps a manager from before it was adapted"):
        model.generate_batch(inputs=many, continuous_batching_config=config, **settings)
    base.destroy_cached_continuous_batching_manager()
    assert config.allow_block_sharing


GIVEN = {"adapter_names": ["b"], "strength": 0.5, "prompt_lengths": [3], "intervention_locations": [[[0]]]}


@pytest.mark.parametrize("name", GIVEN)
def test_what_no_request_can_be_given_is_refused(many, name):
    """Transformers drops what `generate_batch` does not know, and `generate` with a paged cache comes to the same."""
    config = pyreft.ReftConfig(positions="l1", layers=[1], low_rank_dimension=4, intervention="loreft")
    model = pyreft.get_reft_model(tiny_llama(), config)
    model.add_adapter("b", config)
    settings = {"generation_config": GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0), name: GIVEN[name]}
    with pytest.raises(pyreft.ReftError, match=f"^{name}: continuous batching takes it for no request"):
        model.generate_batch(inputs=many[:1], warmup=False, **settings)
    with pytest.raises(pyreft.ReftError, match=f"^{name}: continuous batching takes it for no request"):
        model.generate(torch.tensor(many[:1]), cache_implementation="paged", **settings)
