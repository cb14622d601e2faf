"""The type of an adapter's parameters: float32, that of what they edit, or the one that an intervention was given."""

import peft
import pytest
import torch

import pyreft
from conftest import shaken, tiny_llama
from pyreft.interventions import Intervention

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
HALF, FULL = torch.bfloat16, torch.float32


def config():
    return pyreft.ReftConfig(layers=[1, 3], positions="l2", low_rank_dimension=4, intervention="loreft")


def ready(dtype):
    intervention = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4, dtype=dtype)
    return pyreft.ReftConfig(representations={"layer": 1, "positions": "l2", "intervention": intervention})


def base(dtype=HALF):
    return tiny_llama().to(dtype)


def types(model, part="reft_"):
    return {parameter.dtype for name, parameter in model.named_parameters() if part in name}


@pytest.mark.parametrize(
    ("autocast", "made", "given", "expected"),
    [
        ({}, HALF, None, FULL),
        ({"autocast_adapter_dtype": True}, HALF, None, FULL),
        ({"autocast_adapter_dtype": True}, HALF, HALF, FULL),
        ({"autocast_adapter_dtype": False}, HALF, None, HALF),
        ({"autocast_adapter_dtype": False}, torch.float16, None, torch.float16),
        ({"autocast_adapter_dtype": False}, FULL, None, FULL),
    ],
)
def test_of_a_new_adapter(autocast, made, given, expected):
    new = config() if given is None else ready(given)
    model = peft.get_peft_model(base(made), new, **autocast)
    assert types(model) == {expected}
    assert types(pyreft.ReftModel(base(made), config(), **autocast)) == {expected}
    model.add_adapter("second", config(), **autocast)
    assert types(model, ".second.") == {expected}
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad.dtype == expected for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_an_intervention_keeps_the_type_it_was_given(dtype):
    assert types(pyreft.get_reft_model(base(), ready(dtype))) == {dtype}


def test_of_a_loaded_adapter(tmp_path):
    saved = shaken(peft.get_peft_model(base(), config()))
    saved.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": False}
    for low in (True, False):
        for loader in (peft.PeftModel, pyreft.ReftModel):
            model = loader.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low, **options)
            assert types(model) == {HALF}
            model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low, **options)
            model.load_adapter(tmp_path, "third", low_cpu_mem_usage=low)
            assert (types(model, ".second."), types(model, ".third.")) == ({HALF}, {FULL})
            state = peft.get_peft_model_state_dict(saved)
            for name, tensor in peft.get_peft_model_state_dict(model).items():
                assert torch.equal(tensor, state[name].to(HALF))


def test_a_lora_beneath_keeps_its_type():
    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    model = peft.get_peft_model(lora, config())
    assert (types(model, "lora_"), types(model, "reft_")) == ({HALF}, {FULL})


class WholeIntervention(Intervention):
    """With a forward of its own, which returns what torch makes of a state and a parameter in float32."""

    def __init__(self, *, embed_dim, **settings):
        super().__init__(embed_dim=embed_dim, **settings)
        self.scale = torch.nn.Parameter(torch.full((embed_dim,), 2.0))

    def forward(self, h, **context):
        return self.scale * h


@pytest.mark.parametrize("rule", ["l2", "all"])
@pytest.mark.parametrize("autocast", [False, True])
def test_states_keep_their_type_whatever_an_intervention_returns(rule, autocast):
    place = {"layer": 1, "positions": rule, "intervention": WholeIntervention(embed_dim=32)}
    model = pyreft.get_reft_model(base(), pyreft.ReftConfig(representations=place))
    with torch.autocast("cpu", HALF, enabled=autocast):
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert {one.dtype for one in states} == {HALF}
