"""Adapters that come and go in several threads, and while a thread goes through the modules."""

import threading
import time

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama
from pyreft.tuner import reft_layers
from pyreft.tuner.layer import ReftLayer
from pyreft.tuner.tuner import ReftTuner

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def config(*layers):
    return pyreft.ReftConfig(layers=list(layers), positions="l2", intervention="loreft", low_rank_dimension=2)


def run(*jobs):
    """Each in a thread of its own; return what they raised."""
    raised = []

    def tell(job):
        try:
            job()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=tell, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture
def slow(monkeypatch):
    """Another thread comes in where an adapter's places have been found, and not been edited yet."""
    check = ReftTuner._check_places

    def wait(self, *args):
        check(self, *args)
        time.sleep(0.1)

    monkeypatch.setattr(ReftTuner, "_check_places", wait)


def test_each_is_in_its_own_places(slow, tmp_path):
    saved = shaken(pyreft.get_reft_model(tiny_llama(), config(0, 2)))
    saved.save_pretrained(tmp_path)
    model = pyreft.get_reft_model(tiny_llama(), config(1), adapter_name="a")
    raised = run(
        lambda: model.add_adapter("b", config(3)),
        lambda: model.load_adapter(tmp_path, "c"),
        lambda: model.add_adapter("d", config(0)),
    )
    assert not raised
    found = {name: [int(layer.number) for layer in reft_layers(model) if name in layer] for name in "abcd"}
    paths = {layer.number: path for path, layer in model.named_modules() if layer in reft_layers(model)}
    places = {name: sorted(paths[number].split("layers.")[1][0] for number in found[name]) for name in "abcd"}
    assert places == {"a": ["1"], "b": ["3"], "c": ["0", "2"], "d": ["0"]}
    assert len(paths) == len(reft_layers(model)) == 4  # no two have one number
    model.set_adapter("c")
    assert torch.equal(model.eval()(IDS).logits, saved(IDS).logits)


def test_what_is_saved_is_not_deleted_meanwhile(tmp_path, monkeypatch):
    model = pyreft.get_reft_model(tiny_llama(), config(1), adapter_name="a")
    model.add_adapter("b", config(1))
    begun, save = threading.Event(), peft.peft_model.get_peft_model_state_dict

    def wait(*args, **kwargs):
        begun.set()
        time.sleep(0.1)
        return save(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "get_peft_model_state_dict", wait)
    assert not run(lambda: model.save_pretrained(tmp_path), lambda: begun.wait() and model.delete_adapter("b"))
    assert list(model.peft_config) == ["a"]
    assert (tmp_path / "b" / "adapter_config.json").exists()


@pytest.mark.parametrize("within", ["layers.2.self_attn", "layers.1.reft_output.a"])
def test_who_goes_through_the_modules_meanwhile_comes_to_the_end(within):
    model = pyreft.get_reft_model(tiny_llama(), config(1), adapter_name="a")
    seen = []
    for name, _ in model.named_modules():
        seen.append(name)
        if name.endswith(within):
            model.add_adapter("b", config(1, 2))
    assert seen[-1].endswith("lm_head")


def test_saving_and_loading_one_directory_do_not_wait_for_each_other(tmp_path, monkeypatch):
    one, other = (pyreft.get_reft_model(tiny_llama(), config(1)) for _ in range(2))
    one.save_pretrained(tmp_path)
    reading, writing = threading.Event(), threading.Event()
    make = pyreft.ReftModel.__init__

    def slowly(self, *args, **kwargs):  # the directory is held
        reading.set()
        writing.wait(0.5)
        make(self, *args, **kwargs)

    monkeypatch.setattr(pyreft.ReftModel, "__init__", slowly)
    load = threading.Thread(target=lambda: pyreft.ReftModel.from_pretrained(tiny_llama(), tmp_path), daemon=True)
    save = threading.Thread(target=lambda: (writing.set(), one.save_pretrained(tmp_path)), daemon=True)
    load.start()
    assert reading.wait(20)
    save.start()
    for thread in (load, save):
        thread.join(20)
        assert not thread.is_alive()
    assert not run(lambda: other.add_adapter("b", config(2)))


def test_a_call_goes_on_while_an_adapter_is_added_at_a_later_place():
    model = pyreft.get_reft_model(tiny_llama(), config(0), adapter_name="a").eval()
    shaken(model)
    expected, added = model(IDS).logits, []

    def add(*_):
        if not added:
            added.append(run(lambda: model.add_adapter("b", config(2))))

    model.get_base_model().model.layers[1].register_forward_hook(add)
    assert torch.equal(model(IDS).logits, expected)
    assert added == [[]]


def test_a_call_has_one_adapter_in_all_layers(monkeypatch):
    model = pyreft.get_reft_model(tiny_llama(), config(0, 1, 2), adapter_name="a").eval()
    model.add_adapter("b", config(0, 1, 2))
    shaken(model)
    logits = {}
    for name in ("b", "a"):
        model.set_adapter(name)
        logits[name] = model(IDS).logits
    half, switch = threading.Event(), ReftLayer.set_adapter

    def slowly(layer, *args, **kwargs):
        switch(layer, *args, **kwargs)
        half.set()
        time.sleep(0.05)

    monkeypatch.setattr(ReftLayer, "set_adapter", slowly)
    found = []
    assert not run(lambda: model.set_adapter("b"), lambda: half.wait() and found.append(model(IDS).logits))
    assert any(torch.equal(found[0], logits[name]) for name in "ab")


def test_a_place_that_cannot_be_edited_leaves_the_base_as_it_was():
    base = tiny_llama()
    base.model.layers[1] = torch.compile(base.model.layers[1], backend="eager")
    expected = base(IDS).logits
    with pytest.raises(Exception, match="reft_output"):
        pyreft.get_reft_model(base, config(1))
    assert torch.equal(base(IDS).logits, expected)
