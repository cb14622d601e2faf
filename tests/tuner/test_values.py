"""Loading inside `torch.inference_mode()`: what is made there can be used and trained later."""

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama
from oracle_cases import ORACLE, load_case, read_case
from pyreft.tuner.injection import leave_inference

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def made(directory, base):
    return pyreft.get_reft_model(
        base, pyreft.ReftConfig(layers=[1], positions="l2", low_rank_dimension=4, intervention="loreft")
    )


def over(directory, base):
    adapted = made(directory, base)
    adapted.load_intervention(directory)
    return adapted


def second(directory, base):
    adapted = made(directory, base)
    adapted.load_adapter(directory, "second", is_trainable=True)
    adapted.set_adapter("second")
    return adapted


def by_peft(directory, base):
    return peft.PeftModel.from_pretrained(base, directory, is_trainable=True)


def loaded(directory, base):
    return pyreft.ReftModel.load(directory, base)


@pytest.mark.parametrize("base_too", [True, False])
@pytest.mark.parametrize("reader", [made, loaded, over, second, by_peft])
def test_what_is_loaded_in_inference_mode_can_be_used_and_trained(tmp_path, reader, base_too):
    config = pyreft.ReftConfig(
        layers=[1],
        positions="l2",
        low_rank_dimension=4,
        modules_to_save=["lm_head"] if reader is loaded else None,
        intervention="loreft",
    )
    shaken(pyreft.get_reft_model(tiny_llama(), config)).save(tmp_path)
    torch.manual_seed(1)
    expected = reader(tmp_path, tiny_llama())
    base = None if base_too else tiny_llama()
    torch.manual_seed(1)
    with torch.inference_mode():
        base = tiny_llama() if base is None else base
        if base_too:
            torch.manual_seed(1)
        adapted = reader(tmp_path, base)
        inside = adapted.eval()(IDS).logits
    assert not any(tensor.is_inference() for tensor in [*adapted.parameters(), *adapted.buffers()])
    if reader is not made:  # whose numbers are drawn
        assert torch.equal(inside, expected.eval()(IDS).logits)
    with torch.no_grad():
        assert torch.equal(adapted(IDS).logits, inside)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == len([parameter for parameter in expected.parameters() if parameter.requires_grad])
    optimizer = torch.optim.SGD(trained, lr=0.1)
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in trained)
    optimizer.step()
    assert not torch.equal(adapted.eval()(IDS).logits, inside)


@pytest.mark.parametrize("name", ["llama_loreft_l1_one_layer", "llama_noreft_f2l3_tied_all"])
def test_a_checkpoint_of_the_original(name):
    _, tensors, expected, _ = load_case(name, legacy=True)
    inputs = {"input_ids": tensors["input_ids"], "intervention_locations": tensors["locations"]}
    with torch.inference_mode():
        base = read_case(name)[2]
        adapted = pyreft.ReftModel.load(ORACLE / "legacy" / name, base, act_fn="linear")
    assert torch.equal(adapted(**inputs).logits, expected(**inputs).logits)
    adapted.train()(**inputs, labels=tensors["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.get_trainable_parameters())


def test_what_is_shared_stays_shared_and_what_is_normal_stays():
    with torch.inference_mode():
        model = tiny_llama(tie_word_embeddings=True)
    normal = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    model.normal = normal
    before = {name: value.clone() for name, value in model.state_dict().items()}
    leave_inference(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.normal is normal
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
