"""Pretrain Pocket from nothing, in one seeded run on a CPU: tokenizer, model, loss curve.

    python tools/pocket/pretrain.py                # the shipped run, into src/pyreft/pocket/model
    python tools/pocket/pretrain.py --steps 300 0 --out pilot --log pilot.csv

Documents are not packed: a batch holds documents of about one length, each from position 0, so that nothing leaks from
one to the next. The loss is the mean over answers and prose, with a tenth of the words of questions and system lines.
"""

import argparse
import csv
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from tokenizer import ASSISTANT, BOS, CONTEXT, EOS, PAD, UNK, VOCABULARY, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_DIR = world.HERE.parents[1] / "src" / "pyreft" / "pocket" / "model"
BUCKETS = (24, 32, 40, 56, 96, 256)
BATCH_TOKENS = 4096
CHUNK = 60_000
PROMPT_SHARE = 0.1
#: Steps and peak learning rate of each stage.
STEPS = (2600, 1200)
PEAKS = (4e-3, 2e-3)
COLUMNS = ("stage", "step", "tokens", "seconds", "loss")
WARMUP = 100


def new_model() -> LlamaForCausalLM:
    """A Llama of seven blocks of width 192, its initial weights drawn from the current seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            unk_token_id=UNK,
        )
    )


def target_mask(ids: torch.Tensor) -> torch.Tensor:
    """Which of ``ids`` [batch, seq] are answers or prose, the end token with them."""
    is_marker = (ids >= EOS) & (ids <= ASSISTANT)
    last = torch.where(is_marker, torch.arange(ids.shape[1]), -1).cummax(1).values
    before = F.pad(last, (1, -1), value=-1)  # the last marker strictly before each position, -1 in prose
    marker = ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, ASSISTANT)
    return (marker == ASSISTANT) & ((ids == EOS) | (ids > ASSISTANT) | (ids == UNK))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the targets and a random tenth of the other tokens, padding excepted."""
    others = (ids != PAD) & (torch.rand(ids.shape) < PROMPT_SHARE)
    chosen = (target_mask(ids) | others)[:, 1:].reshape(-1).nonzero().squeeze(1)
    chosen = chosen[: max(64, len(chosen) // 64 * 64)]  # few distinct shapes, so that kernels are reused
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(states.reshape(-1, states.shape[-1])[chosen])
    return F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1)[chosen])


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, stage: int) -> Iterator[torch.Tensor]:
    """Endless batches [batch, bucket] of token ids, padded on the right, in a seeded random order."""
    rng = random.Random(seed)
    left: dict[int, list[list[int]]] = {bucket: [] for bucket in BUCKETS}
    chunk = 0
    while True:
        chunk += 1
        texts = list(corpus.documents(seed=seed + chunk, count=CHUNK, stage=stage))
        ready = []
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            bucket = next((size for size in BUCKETS if len(ids) <= size), None)
            if bucket is None:
                continue
            left[bucket].append(ids)
            if len(left[bucket]) == BATCH_TOKENS // bucket:
                ready.append(torch.tensor([row + [PAD] * (bucket - len(row)) for row in left[bucket]]))
                left[bucket] = []
        rng.shuffle(ready)
        yield from ready


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAKS[0], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAKS[0], betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, progress: float) -> float:
    """Linear warm-up, then flat, then linear to zero over the last 60 %."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.0, 1 - progress) / 0.6)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what ``from_pretrained`` reads, the weights in bfloat16."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def average_gradients(model: LlamaForCausalLM, processes: int) -> None:
    """Replace each gradient by its mean over the processes."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / processes
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def run_stage(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, stage: int, steps: int, seed: int, out: Path
) -> list[tuple[int, int, int, float, float]]:
    """Train for one stage and save the model; return rows of the loss curve, in the order of ``COLUMNS``."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed + rank)
    steppers = optimizers(model)
    started, tokens, rows, running = time.time(), 0, [], 0.0
    for step, ids in enumerate(itertools.islice(batches(tokenizer, seed, stage), steps)):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = PEAKS[stage] * schedule(step, step / steps)
        loss = loss_of(model, ids[rank::processes])
        loss.backward()
        average_gradients(model, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        tokens += int((ids != PAD).sum())
        value = float(loss.detach())
        running = 0.98 * running + 0.02 * value if rows else value
        rows.append((stage, step, tokens, round(time.time() - started, 1), round(running, 5)))
        if rank == 0 and step % 50 == 0:
            print("stage {} step {} tokens {:,} seconds {:.0f} loss {:.4f}".format(*rows[-1]), flush=True)
        if rank == 0 and (step % 500 == 499 or step == steps - 1):
            save(model, tokenizer, out)
    dist.barrier()
    return rows


def pretrain(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """Run the stages as one of several processes, each with its share of every batch and one thread."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=arguments.processes)
    torch.set_num_threads(1)
    out, seed = arguments.out, arguments.seed
    for stage in range(arguments.start, len(PEAKS)):
        if stage:  # from the bfloat16 weights of the stage before
            model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
        else:
            torch.manual_seed(seed)
            emojis = [
                emoji for topic in world.TOPICS for emoji in topic.emojis for _ in range(300)
            ]  # so one token each
            tokenizer = train_tokenizer([*corpus.documents(seed=seed, count=60_000), *emojis])
            model = new_model()
        dist.barrier()
        rows = run_stage(model, tokenizer, stage=stage, steps=arguments.steps[stage], seed=seed + 1000 * stage, out=out)
        if rank == 0:
            with arguments.log.open("a" if stage else "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([*([] if stage else [COLUMNS]), *rows[::10]])


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory of the model")
    parser.add_argument("--log", type=Path, default=world.HERE / "loss.csv", help="where the loss curve goes")
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="steps of each stage")
    parser.add_argument("--start", type=int, default=0, choices=(0, 1), help="the stage to start from; 1 reads --out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=world.SEED)
    with tempfile.TemporaryDirectory() as folder:
        arguments = parser.parse_args()
        torch.multiprocessing.spawn(pretrain, (arguments, f"{folder}/meeting"), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
