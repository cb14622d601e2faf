"""A short training, alone or as one of several processes; run by `test_distributed.py`.

python train_alone_or_together.py DIRECTORY BATCH_SIZE
"""

import os
import sys

import torch
from transformers import TrainingArguments

import pyreft
from conftest import tiny_llama


def main(directory: str, batch_size: int) -> None:
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
        save_strategy="epoch",
        disable_tqdm=True,
    )
    trainer = pyreft.ReftTrainerForCausalLMDistributed(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.reach.why_not is None
    trainer.save_model(directory)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
