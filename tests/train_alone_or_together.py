"""A short training, alone or as one of several processes; run by `test_distributed.py`.

python train_alone_or_together.py DIRECTORY BATCH_SIZE [fsdp | zero2 | zero3]

With a third argument each process holds a part: of the parameters (FSDP2, ZeRO-3), or of gradients and states.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import pyreft
from conftest import tiny_llama


def sharding(name: str) -> dict[str, Any]:
    if name == "fsdp":
        layers = ["LlamaDecoderLayer"]
        return {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": layers},
        }
    if name.startswith("zero"):
        settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        stage = {"zero_optimization": {"stage": int(name[-1])}, "zero_allow_untested_optimizer": True}
        return {"deepspeed": {**settings, **stage}}
    return {"save_strategy": "epoch"}


def main(directory: str, batch_size: int, shards: str = "") -> None:
    torch.manual_seed(1)
    model = pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions="l2", low_rank_dimension=4))
    ids = torch.randint(3, 96, (32, 10), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids]
    arguments = TrainingArguments(
        output_dir=directory,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        per_device_train_batch_size=batch_size,
        num_train_epochs=2,
        learning_rate=0.05,
        optim="sgd",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no"} | sharding(shards),
    )
    trainer = pyreft.ReftTrainerForCausalLMDistributed(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    if not shards:
        assert trainer.reach.why_not is None
    if shards in ("fsdp", "zero3"):  # else nothing was sharded, and the test says nothing
        parameter = next(iter(trainer.model.get_trainable_parameters()))
        assert hasattr(parameter, "placements") or hasattr(parameter, "ds_shape"), type(parameter)
    trainer.save_model(directory)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(directory, "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
