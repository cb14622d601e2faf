"""A call is safe: from several threads, inside another one, by an assistant, by replicas, when it is interrupted."""

import asyncio
import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria

import pyreft
from architectures import ARCHITECTURES
from conftest import pad, shaken, tiny_llama
from pyreft.interventions import Intervention
from pyreft.tuner import edits_of, reft_layers
from pyreft.tuner.call import running

GREEDY = {"max_new_tokens": 6, "do_sample": False}
RULES = {"a": "l3", "b": "f2+l2", "c": "all"}


def tenants():
    """A model with three adapters of different rules, the first one active."""
    torch.manual_seed(0)
    first, *others = (
        (name, pyreft.ReftConfig(layers=[1, 3], positions=rule, low_rank_dimension=2, intervention="loreft"))
        for name, rule in RULES.items()
    )
    adapted = pyreft.get_reft_model(tiny_llama(), first[1], adapter_name=first[0])
    for name, config in others:
        adapted.add_adapter(name, config)
    return shaken(adapted)


@pytest.fixture
def adapted():
    return tenants()


def prompt_of(length):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def plain(adapted, ids):
    return adapted(input_ids=ids).logits


@torch.no_grad()
def generated(adapted, ids):
    return adapted.generate(input_ids=ids, **GREEDY)


def asked(name):
    return lambda adapted, ids: adapted.generate(input_ids=ids, adapter_names=[name], **GREEDY)


@torch.no_grad()
def rows(adapted, ids):
    return adapted(input_ids=ids.repeat(3, 1), adapter_names=["b", "__base__", "c"]).logits


@torch.no_grad()
def stronger(adapted, ids):
    return adapted(input_ids=ids, strength=0.5).logits


@torch.no_grad()
def base(adapted, ids):
    with adapted.disable_adapter():
        return adapted(input_ids=ids).logits


KINDS = [plain, generated, asked("a"), asked("b"), asked("c"), asked("__base__"), rows, stronger, base]


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_get_what_each_call_gives_alone(adapted, threads):
    calls = [(kind, prompt_of(length)) for kind in KINDS for length in (9, 4, 17)]
    alone = [kind(adapted, ids) for kind, ids in calls]

    def work(first):
        for number in [*range(first, len(calls)), *range(first)]:
            kind, ids = calls[number]
            assert torch.equal(kind(adapted, ids), alone[number]), f"call {number}"

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, len(calls), len(calls) // threads)))
    assert not running.frames


def test_an_asyncio_server_with_a_pool_of_threads(adapted):
    calls = [(kind, prompt_of(length)) for length in (5, 12) for kind in KINDS]
    alone = [kind(adapted, ids) for kind, ids in calls]

    async def serve():
        return await asyncio.gather(*(asyncio.to_thread(kind, adapted, ids) for kind, ids in calls * 2))

    for found, expected in zip(asyncio.run(serve()), alone * 2, strict=True):
        assert torch.equal(found, expected)


class Inside(LogitsProcessor, StoppingCriteria):
    """Does something after a number of steps of a generation, as a processor of logits or to decide on its end."""

    def __init__(self, act, step=2):
        self.act, self.step, self.steps, self.seen = act, step, 0, []

    def __call__(self, ids, scores):
        self.steps += 1
        if self.steps == self.step:
            self.seen.append(self.act(ids))
        return scores if scores is not None and isinstance(scores, torch.Tensor) else torch.zeros(len(ids)).bool()


@pytest.mark.parametrize("name", RULES)
def test_a_change_applies_to_calls_that_begin_later(adapted, name):
    """Another adapter, another strength: not in the middle of a generation."""
    ids = prompt_of(8)
    adapted.set_adapter(name)
    expected = generated(adapted, ids)
    other = "a" if name != "a" else "c"

    def change(_):
        adapted.set_adapter(other)
        adapted.set_strength(name, 0.1)

    with torch.no_grad():
        tokens = adapted.generate(input_ids=ids, **GREEDY, logits_processor=[Inside(change, 1)])
    assert torch.equal(tokens, expected)
    assert adapted.active_adapter == other
    adapted.set_strength(name, 1.0)
    assert torch.equal(generated(adapted, ids), asked(other)(adapted, ids))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("role", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("name", RULES)
def test_calls_inside_a_generation(adapted, name, role, use_cache):
    """Of other prompts, with other adapters, generations too: each is what it is alone, and so is the outer one."""
    adapted.set_adapter(name)
    ids, inner = prompt_of(10), prompt_of(7)
    options = {**GREEDY, "use_cache": use_cache}
    expected = adapted.generate(input_ids=ids, **options)
    alone = [kind(adapted, inner) for kind in KINDS]
    at = Inside(lambda _: [kind(adapted, inner) for kind in KINDS])
    assert torch.equal(adapted.generate(input_ids=ids, **options, **{role: [at]}), expected)
    assert all(torch.equal(found, one) for found, one in zip(at.seen[0], alone, strict=True))
    assert not running.frames


def test_the_model_reads_its_own_answer_inside_its_generation(adapted):
    """All tokens so far, without the cache, as a processor that asks the model for logits of its own."""
    ids = prompt_of(10)
    at = Inside(lambda tokens: (tokens, plain(adapted, tokens)))
    adapted.generate(input_ids=ids, **GREEDY, logits_processor=[at])
    tokens, found = at.seen[0]
    assert torch.equal(found, plain(adapted, tokens))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("assistant", ["itself", "its early exit", "another adapted model"])
def test_an_assistant_changes_no_answer(adapted, name, assistant):
    adapted.set_adapter(name)
    ids = prompt_of(12)
    expected = generated(adapted, ids)
    options = {
        "itself": {"assistant_model": adapted.get_base_model()},
        "its early exit": {"assistant_early_exit": 1},
        "another adapted model": {"assistant_model": tenants().get_base_model()},
    }[assistant]
    assert torch.equal(adapted.generate(input_ids=ids, **GREEDY, **options), expected)
    assert torch.equal(generated(adapted, ids), expected)


def test_a_forward_inside_a_forward(adapted):
    """A hook on a block that asks the model about something else, in the middle of a step."""
    ids, inner = prompt_of(9), prompt_of(5)
    expected, alone = plain(adapted, ids), plain(adapted, inner)
    seen = []

    def ask(module, args, output):
        if not seen:
            seen.append(None)
            seen.append(plain(adapted, inner))

    handle = adapted.get_base_model().model.layers[2].register_forward_hook(ask)
    assert torch.equal(plain(adapted, ids), expected)
    assert torch.equal(seen[1], alone)
    handle.remove()


@pytest.mark.parametrize("kind", [plain, generated, rows])
def test_what_raises_leaves_nothing_behind(adapted, kind, monkeypatch):
    ids = prompt_of(9)
    expected = kind(adapted, ids)
    for error in (RuntimeError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr(adapted.get_base_model().model.norm, "forward", lambda *_, e=error: (_ for _ in ()).throw(e))
            with pytest.raises(error):
                kind(adapted, ids)
        assert not running.frames
    with pytest.raises(pyreft.ReftError, match="strength"), torch.no_grad():
        adapted(input_ids=ids, strength={"nobody": 1})
    with pytest.raises(pyreft.ReftError, match="adapter_names"):
        adapted(input_ids=ids, adapter_names=["nobody"])
    assert not running.frames
    assert torch.equal(kind(adapted, ids), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_during_a_call_has_none_in_flight(adapted, copied):
    ids = prompt_of(9)
    at = Inside(lambda _: copied(adapted))
    expected = adapted.generate(input_ids=ids, **GREEDY, logits_processor=[at])
    (twin,) = at.seen
    assert edits_of(twin) is not edits_of(adapted)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.zero_()  # the copy shares nothing
    assert torch.equal(generated(twin, ids), expected)


def test_replicas_in_threads_compute_with_their_own_parameters(adapted):
    """What `DataParallel` does on several GPUs: copies by reference, with tensors in the place of parameters."""
    base = adapted.get_base_model()
    modules = list(base.modules())
    ids = [prompt_of(9), prompt_of(6)]
    expected = [plain(adapted, one) for one in ids]

    def replicate(factor):
        copies = {id(module): module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            twin = copies[id(module)]
            for name, child in module._modules.items():
                setattr(twin, name, copies[id(child)])
            for name, parameter in module._parameters.items():
                setattr(twin, name, None if parameter is None else parameter * factor)
            twin._former_parameters = dict(module._parameters)
        return copies[id(base)]

    found = [None, None]

    def run(number):
        with torch.no_grad():
            found[number] = replicate(1.0)(input_ids=ids[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # the edits are the replica's, too: with all of its parameters doubled, it is as the model with all of them doubled
    with torch.no_grad():
        twice = replicate(2.0)(input_ids=ids[0]).logits
        for parameter in base.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(twice, plain(adapted, ids[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_two_threads_that_train_one_model_are_told(adapted, mode):
    getattr(adapted, mode)()
    batch = {"input_ids": prompt_of(9), "labels": prompt_of(9)}
    first, ready, go = [], threading.Event(), threading.Event()

    def other():
        first.append(adapted(**batch).loss)
        ready.set()
        go.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(60)
    loss = adapted(**batch).loss
    with pytest.raises(pyreft.ReftError, match="Two threads train this model at once"):
        loss.backward()
    assert all(parameter.grad is None for parameter in adapted.parameters())
    go.set()
    thread.join()
    first.clear()  # whose graph is gone
    adapted(**batch).loss.backward()


def test_training_in_one_thread_and_asking_in_another(adapted):
    """Asking does not train, with gradients switched off or on."""
    ids = prompt_of(9)
    expected, stop = plain(adapted, ids), threading.Event()
    wrong = []

    def ask():
        while not stop.is_set():
            if not torch.equal(plain(adapted, ids), expected) or not torch.equal(
                adapted(input_ids=ids).logits, expected
            ):
                wrong.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    batch = {"input_ids": prompt_of(14), "labels": prompt_of(14)}
    alone = None
    for _ in range(5):
        adapted.zero_grad()
        adapted(**batch).loss.backward()
        gradients = [parameter.grad.clone() for parameter in adapted.parameters() if parameter.grad is not None]
        alone = alone or gradients
        assert all(torch.equal(one, other) for one, other in zip(gradients, alone, strict=True))
    stop.set()
    thread.join()
    assert not wrong


class Doubling(Intervention):
    """An intervention without parameters."""

    def formula(self, h):
        return 2 * h


def test_an_intervention_without_parameters():
    config = pyreft.ReftConfig(layers=[1], positions="l2", intervention=Doubling)
    adapted = pyreft.get_reft_model(tiny_llama(), config).eval()
    ids = prompt_of(7)
    states = adapted(input_ids=ids, output_hidden_states=True).hidden_states[2]
    expected = tiny_llama()(input_ids=ids, output_hidden_states=True).hidden_states[2]
    expected[:, -2:] *= 2
    torch.testing.assert_close(states, expected)


def test_what_is_active_where():
    """A layer whose adapters are switched off by itself stays off, whatever the others do."""
    adapted = tenants()
    ids, mask = pad([[5, 6, 7, 8, 9], [5, 6, 7]], "left")
    layer = reft_layers(adapted)[0]
    layer.enable_adapters(False)
    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        with adapted.disable_adapter():
            expected = adapted(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(found[4], expected[4])


def test_a_module_of_the_model_has_no_trace_of_a_call(adapted):
    """Nothing that a call found is kept by the model: a hundred calls leave it as it was."""

    def size():
        return len(pickle.dumps(adapted))

    before = size()
    for length in range(3, 20):
        generated(adapted, prompt_of(length))
        rows(adapted, prompt_of(length))
    assert size() == before
    assert isinstance(adapted.get_base_model().model.layers[1].reft_output, nn.Module)


def test_a_module_that_a_training_step_does_not_call_is_told_once():
    model, ids = tiny_llama(), torch.arange(3, 11).view(2, 4)
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(component=["value_output", "down_output"], layers=[0, 1]))
    mlp = model.model.layers[1].mlp
    linear = torch.nn.functional.linear

    def fused(x):  # in the manner of kernels that are given the weights of several modules
        product = torch.nn.functional.silu(linear(x, mlp.gate_proj.weight)) * linear(x, mlp.up_proj.weight)
        return linear(product, mlp.down_proj.weight)

    mlp.forward = fused
    adapted.train()
    with pytest.warns(UserWarning, match=r"has not called 'model\.layers\.1\.mlp\.down_proj'"):
        adapted(input_ids=ids, labels=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(input_ids=ids, labels=ids)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_blocks_whose_forward_alone_is_called_are_told_without_training(way):
    model, ids = tiny_llama(), torch.arange(3, 11).view(2, 4)
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(layers=[1, 2], component="block_output")).eval()
    block = model.model.layers[1]

    class Around(nn.Module):  # in the manner of SqueezeBERT's encoder, and of models from the hub
        def __init__(self):
            super().__init__()
            self.inside = [block]  # no child, so the paths stay

        def forward(self, *args, **kwargs):
            return self.inside[0].forward(*args, **kwargs)

    model.model.layers[1] = Around()
    with pytest.warns(UserWarning, match="The model has not called .*, so what is to be edited there was not. Some"):
        adapted(input_ids=ids) if way == "forward" else adapted.generate(input_ids=ids, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(input_ids=ids)


def test_a_step_that_raises_says_nothing_of_what_it_did_not_call():
    model, ids = tiny_llama(), torch.arange(3, 11).view(2, 4)
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(layers="all", positions="all")).train()

    def full(*_):
        raise torch.OutOfMemoryError

    hook = model.model.layers[1].register_forward_pre_hook(full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.OutOfMemoryError):
            adapted(input_ids=ids, labels=ids)
    hook.remove()
    del model.model.layers[2:]
    with pytest.warns(UserWarning, match="has not called 'Linear'"):
        adapted(input_ids=ids, labels=ids)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_blocks_that_training_skips_at_random_are_not_told(share):
    bart = next(one for one in ARCHITECTURES if one.name == "BART").make()
    bart.config.encoder_layerdrop, bart.model.encoder.layerdrop = share, 1.0
    adapted = pyreft.get_reft_model(bart, pyreft.ReftConfig(layers="all", positions="all")).train()
    ids = torch.arange(3, 11).view(2, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted(input_ids=ids, labels=ids)
    assert any("has not called" in str(one.message) for one in told) is (share == 0)
