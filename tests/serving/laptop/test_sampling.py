"""Tokens by penalties, temperature, top-k and top-p, as transformers and the OpenAI API define them."""

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from pyreft.errors import ReftError
from pyreft.serving.laptop.sampling import Sampler, Sampling, told

PROMPT = [3, 5, 5]


def drawn(logits, count=4000, **settings):
    """How often each token is drawn."""
    found = torch.zeros(len(logits))
    sampler = Sampler(Sampling(seed=0, **settings), PROMPT)
    for _ in range(count):
        sampler._answered.clear()
        found[sampler.choose(logits).token] += 1
    return found / count


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, []),
        ({"temperature": 1.0, "top_k": 3}, [TopKLogitsWarper(3)]),
        ({"temperature": 2.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"temperature": 1.5, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.5}, [TopKLogitsWarper(4), TopPLogitsWarper(0.5)]),
    ],
)
def test_draws_are_those_of_transformers(settings, warpers):
    logits = torch.randn(8) * 2
    scores = logits[None] / settings["temperature"]
    for warper in warpers:
        scores = warper(None, scores)
    torch.testing.assert_close(drawn(logits, **settings), scores[0].softmax(-1), atol=0.04, rtol=0)


def test_penalties_and_bias():
    logits = torch.tensor([1.0, -1.0, 2.0, 1.5, 0.5, 1.9])
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([PROMPT]), logits[None].clone())[0]
    assert torch.equal(Sampler(Sampling(repetition_penalty=2.0), PROMPT)._penalized(logits.clone()), expected)
    sampler = Sampler(Sampling(frequency_penalty=0.5, presence_penalty=0.25, bias={4: 1.0, 0: -100.0}), PROMPT)
    chosen = [sampler.choose(logits).token for _ in range(4)]
    # 2.0; 1.9 before 1.25; then 1.5 of both 3 and 4, the first; then 4
    assert chosen == [2, 5, 3, 4]
    assert torch.equal(logits, torch.tensor([1.0, -1.0, 2.0, 1.5, 0.5, 1.9]))  # those of the model stay


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-6])
def test_a_temperature_by_which_nothing_can_be_divided_takes_the_likeliest(temperature):
    logits = torch.tensor([1.0, 30.0, 29.0])
    assert Sampler(Sampling(temperature=temperature), PROMPT).choose(logits).token == 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"bias": {0: 1.0}}])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nothing_is_chosen_by_logits_that_are_none(settings, value):
    logits = torch.tensor([1.0, float(value), float("-inf")])
    with pytest.raises(ReftError, match="the model's logits are not finite"):
        Sampler(Sampling(**settings), PROMPT).choose(logits)


def test_a_seed_is_for_one_answer_of_a_request():
    logits = torch.zeros(50)

    def answer(seed, index):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), PROMPT, index)
        return [sampler.choose(logits).token for _ in range(8)]

    assert answer(1, 0) == answer(1, 0)
    assert answer(1, 0) != answer(1, 1)
    assert answer(-1, 0) == answer(-1, 0) != answer(2**63 - 1, 5)


def test_what_is_told_is_the_model_s_own():
    logits = torch.tensor([0.0, 1.0, float("-inf")])
    known = logits.log_softmax(-1)
    choice = told(logits, 0, 2)
    assert (choice.token, [token for token, _ in choice.top]) == (0, [1, 0])
    assert choice.logprob == known[0].item()
    assert told(logits, 2, 0).logprob == -9999.0  # JSON has no infinity
    assert told(logits, 0, 3).top[2] == (2, -9999.0)
    assert told(logits, 1, None) == (1, None, ())
