"""What a step does is of its thread alone: others call the same model meanwhile, and get what they get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyreft
from conftest import tiny_llama
from pyreft.reach import Reach, ReachCallback
from pyreft.reach.layers import SkipLayers
from pyreft.reach.prefixes import SkipPrefixes
from reaching import adapt, assert_same, batch_of, loss_and_gradients, rows_of

BATCHES = [
    batch_of(rows_of(*lengths, seed=seed), "left") for seed, lengths in enumerate([(11, 7, 8), (14, 9), (6, 20)])
]
ASKED = [{"input_ids": torch.tensor([row])} for row in rows_of(9, 17, 5, seed=7)]
ROUNDS = 40


class InAnotherWay(LlamaForCausalLM):
    """A model of one's own, which is computed in whole rows."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def models():
    own = InAnotherWay(LlamaConfig(**tiny_llama().config.to_dict())).eval()
    return {
        SkipPrefixes: adapt(tiny_llama(), layers=[1, 2]),
        SkipLayers: adapt(own, layers=[2], positions="all"),
    }


def everything(adapted):
    """What all threads share of a model: its modules' attributes, hooks and children."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in adapted.modules()
    ]


@pytest.mark.parametrize("way", [SkipPrefixes, SkipLayers])
@pytest.mark.parametrize("adapters", ["edited", "base"])
def test_one_thread_trains_and_another_asks(way, adapters):
    adapted = models()[way]
    reach = Reach(adapted, memory=0)  # everything is run in each step
    training = [loss_and_gradients(adapted, adapted, batch) for batch in BATCHES]

    def ask(inputs):
        with torch.no_grad():
            if adapters == "edited":
                return adapted(**inputs).logits
            with adapted.disable_adapter():
                return adapted(**inputs).logits

    answers = [ask(inputs) for inputs in ASKED]
    begin = threading.Barrier(3)

    def train():
        begin.wait()
        for n in range(ROUNDS):
            assert_same(loss_and_gradients(reach, adapted, BATCHES[n % 3]), training[n % 3])
            assert reach.why_not is None
            assert type(reach._way) is way
        return True

    def serve():
        begin.wait()
        for n in range(4 * ROUNDS):
            assert torch.equal(ask(ASKED[n % 3]), answers[n % 3])
        return True

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(one) for one in (train, serve, serve)]
        assert all(job.result() for job in jobs)


@pytest.mark.parametrize("way", [SkipPrefixes, SkipLayers])
def test_nothing_of_the_model_is_other_while_a_step_runs(way):
    """Also while a new model is tried, at whatever module another thread may be."""
    adapted = models()[way]
    for layer in adapted.modules():
        layer.training = False
    before, seen = everything(adapted), []
    base = adapted.get_base_model()
    plain = torch.nn.functional.embedding

    def looking(*args, **kwargs):
        seen.append(everything(adapted) == before)
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", looking)
        reach = Reach(adapted)
        for _ in range(2):
            reach(**BATCHES[0])
    assert type(reach._way) is way
    assert len(seen) > 3
    assert all(seen)
    assert "forward" not in vars(base.model.layers[0])


def test_a_trainer_serves_its_own_thread():
    """While `ReachCallback` is on, another thread's model in training mode still gives logits."""
    adapted = adapt(tiny_llama())
    callback = ReachCallback(adapted)
    callback.on_train_begin()
    adapted.get_base_model().train()
    try:
        assert list(adapted(**BATCHES[0])) == ["loss"]
        with ThreadPoolExecutor(1) as pool:
            output = pool.submit(lambda: adapted(**BATCHES[0])).result()
        assert output.logits.shape[:2] == BATCHES[0]["input_ids"].shape
        with ThreadPoolExecutor(1) as pool:  # an end in another thread, as of a training that was interrupted
            pool.submit(callback.on_train_end).result()
    finally:
        callback.on_train_end()


def test_serving_nests():
    adapted, other = adapt(tiny_llama()), adapt(tiny_llama(), layers=[0])
    outer, inner, of_other = Reach(adapted), Reach(adapted), Reach(other)
    with outer.serving(losses=True):
        with of_other.serving(losses=True), inner.serving(losses=True):
            adapted(**BATCHES[0])
            other(**BATCHES[0])
        assert outer._way is None
        assert inner._way is not None
        assert of_other._way is not None
        adapted(**BATCHES[0])
        assert outer._way is not None
    assert adapted(**BATCHES[0]).logits is not None


def test_two_threads_share_a_reach():
    """Losses without gradients, of two threads with one store."""
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    with torch.no_grad():
        expected = [adapted(**batch).loss for batch in BATCHES]

    def evaluate(shift):
        with torch.no_grad():
            for n in range(ROUNDS):
                which = (n + shift) % 3
                torch.testing.assert_close(reach(**BATCHES[which]).loss, expected[which], rtol=1e-5, atol=0)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(evaluate, (0, 1)))


def test_two_threads_that_train_are_told():
    adapted = adapt(tiny_llama())
    reach = Reach(adapted)
    loss = reach(**BATCHES[0]).loss
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: reach(**BATCHES[1]).loss).result()
        with pytest.raises(pyreft.ReftError, match="Two threads train this model at once"):
            loss.backward()
        assert other.requires_grad
