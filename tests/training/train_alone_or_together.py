"""A short training, alone or as one of several processes; run by `test_distributed.py`.

python train_alone_or_together.py BASE DIRECTORY BATCH_SIZE [fsdp | zero2 | zero3 | train | eval | apart]

With `train` or `eval`, these data differ between the processes; with `apart`, they do not join. Writes the adapter
and, as `losses.json`, the loss of each step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments

import pyreft

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def arguments_of(directory: str, batch_size: int, way: str) -> TrainingArguments:
    zero = way.startswith("zero")
    arguments = TrainingArguments(
        output_dir=directory,
        use_cpu=not zero and way != "apart",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ and way != "apart" else None,
        per_device_train_batch_size=batch_size,
        num_train_epochs=2,
        learning_rate=0.05,
        optim="sgd",
        report_to="none",
        logging_steps=1,
        save_strategy="no" if way == "fsdp" else "epoch",
        disable_tqdm=True,
        deepspeed={**ZERO, "zero_optimization": {"stage": int(way[-1])}} if zero else None,
    )
    if zero:  # accelerate counts the processes of accelerators alone
        state = arguments.distributed_state
        state.backend, state.num_processes = "gloo", int(os.environ["WORLD_SIZE"])
        state.process_index = state.local_process_index = int(os.environ["RANK"])
    return arguments


def shard(trainer: Any) -> None:
    """Let the trainer shard its model with FSDP2, which accelerate itself does on accelerators alone."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    trainer.is_fsdp_enabled = True


def save_shards(model: Any, directory: str, is_main_process: bool) -> None:
    """What `Trainer.save_model` does, whose gathered tensors on a CPU are not plain ones."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    state = {name: tensor.clone() for name, tensor in whole.items()}
    model.save_pretrained(directory, state_dict=state, is_main_process=is_main_process)


def main(base: str, directory: str, batch_size: int, way: str = "") -> None:
    arguments = arguments_of(directory, batch_size, way)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = pyreft.get_reft_model(model, pyreft.ReftConfig(positions="l2", low_rank_dimension=4, intervention="loreft"))
    ids = torch.randint(3, 96, (32, 10), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids]
    held_out = rows[:8]
    if way == "train" and os.environ["RANK"] == "1":
        rows[17] = rows[16]
    if way == "eval":
        held_out = {"seen": rows[:8], "unseen": held_out[int(os.environ["RANK"]) :]}
    trainer = pyreft.ReftTrainerForCausalLMDistributed(
        model=model, args=arguments, train_dataset=rows, eval_dataset=held_out
    )
    if way == "fsdp":
        shard(trainer)
    trainer.train()
    if way == "fsdp":
        assert all(isinstance(parameter, DTensor) for parameter in model.get_trainable_parameters())
        assert trainer.reach.why_not == "the parameters of the base model are sharded"
        save_shards(model, directory, arguments.should_save)
    else:
        assert trainer.reach is None if way == "zero3" else trainer.reach.why_not is None
        trainer.save_model(directory)
    if arguments.should_save:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(directory, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
