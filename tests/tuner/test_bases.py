"""Base models that are quantised, or whose weights lie elsewhere: trained, saved, loaded, generated."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import pyreft
from conftest import tiny_llama

GREEDY = {"max_new_tokens": 6, "do_sample": False}
CONFIG = {"intervention": "loreft", "positions": "f1+l2", "low_rank_dimension": 4}


def trained(model, steps=15):
    """Make the answer to each prompt the same; return the losses."""
    torch.manual_seed(0)
    ids = torch.randint(10, 96, (8, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -2:] = torch.tensor([7, 8])
    labels = ids.clone()
    labels[:, :-2] = -100
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def check(make, tmp_path):
    model = pyreft.get_reft_model(make(), pyreft.ReftConfig(**CONFIG))
    losses = trained(model)
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    ids = torch.randint(3, 96, (2, 7))
    tokens = model.generate(input_ids=ids, **GREEDY)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **GREEDY), tokens)
    model.save_pretrained(tmp_path / "adapter")
    again = pyreft.ReftModel.from_pretrained(make(), tmp_path / "adapter")
    assert torch.equal(again.generate(input_ids=ids, **GREEDY), tokens)
    return losses


def test_weights_on_the_cpu_until_they_are_needed(tmp_path):
    """To the bit: the same computation with weights that come and go."""
    expected = check(tiny_llama, tmp_path / "plain")
    assert check(lambda: accelerate.cpu_offload(tiny_llama(), execution_device="cpu"), tmp_path) == expected


def test_weights_on_the_disk_until_they_are_needed(tmp_path):
    check(lambda: accelerate.disk_offload(tiny_llama(), tmp_path / "weights", execution_device="cpu"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_trainer_of_a_model_by_a_device_map(tmp_path):
    """Its last block is read from the disk in each step; the blocks below the edit are run once."""
    tiny_llama().save_pretrained(tmp_path / "base")
    places = dict.fromkeys(("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"), "cpu")
    devices = {f"model.{name}": place for name, place in (places | {"layers.3": "disk"}).items()} | {"lm_head": "cpu"}
    offloaded = {"device_map": devices, "offload_folder": tmp_path / "weights"}
    losses = []
    for options in ({}, offloaded):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
        assert base.model.layers[3].mlp.up_proj.weight.is_meta == bool(options)
        torch.manual_seed(0)
        ids = torch.randint(3, 96, (8, 9)).tolist()
        trainer = pyreft.ReftTrainer(
            model=pyreft.get_reft_model(base, pyreft.ReftConfig(layers=[1], **CONFIG)),
            args=TrainingArguments(tmp_path, num_train_epochs=4, logging_steps=1, report_to="none", disable_tqdm=True),
            train_dataset=[{"input_ids": row, "labels": [-100] * 7 + row[7:]} for row in ids],
        )
        trainer.train()
        assert trainer.reach.describe().startswith("Each step leaves out ")
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights(tmp_path, bits):
    quantization = pytest.importorskip("torchao.quantization")

    def make():
        model = tiny_llama()
        config = {
            8: lambda: quantization.Int8WeightOnlyConfig(),
            4: lambda: quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
            ),
        }[bits]()
        quantization.quantize_(model.model, config)
        assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
        return model

    check(make, tmp_path)
