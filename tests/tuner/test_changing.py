"""Adapters that come and go in several threads, and while a thread goes through the modules."""

import threading
import time

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama
from pyreft.tuner import reft_layers
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
