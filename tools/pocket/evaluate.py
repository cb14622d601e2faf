"""Judge a checkpoint on what pretraining never saw, by the world's own rules, and draw the loss curve.

    python tools/pocket/evaluate.py [--model DIR]      # writes figures.json and loss.png

Greedy decoding throughout. It does not know how the model was trained.
"""

import argparse
import csv
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus
import skills
import torch
import world
from pretrain import MODEL_DIR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from world import FORM_ASPECT, HELD_OUT, REGISTERS, SYSTEM_LINES, Topic

#: The kinds of case that the held-out figure is about.
COMBINATIONS = ("pair", "form", "topic_register")
#: Tokens to generate at most; the longest answer of the world is shorter.
LONGEST = 64


@dataclass(frozen=True)
class Case:
    """One question to judge."""

    topic: Topic
    form: str
    register: str
    system: str | None
    request: str | None = None  # the register asked for in the user's turn

    @property
    def prompt(self) -> str:
        """The conversation up to the answer, without its beginning token."""
        opening = f"<|system|>{self.system}</s>" if self.system else ""
        closing = f" {self.request}" if self.request else ""
        return f"{opening}<|user|>{self.form.format(x=self.topic.x)}{closing}</s><|assistant|>"

    def judge(self, reply: str) -> tuple[bool, bool, bool]:
        """Whether ``reply`` is in the register, on topic, and exactly the expected answer."""
        aspect = FORM_ASPECT[self.form]
        in_register = world.register_of(reply) == self.register
        return (
            in_register,
            world.on_topic(reply, self.topic, aspect),
            reply == world.answer(self.topic, aspect, self.register),
        )


def _case(rng: random.Random, topic: Topic, form: str, register: str, *, unseen_line: bool = False) -> Case:
    lines = SYSTEM_LINES[register]
    system = lines[-1] if unseen_line else None if register == "plain" else rng.choice(lines[:-1])
    return Case(topic, form, register, system)


def cases(*, per_register: int = 60, seed: int = world.SEED + 2) -> dict[str, list[Case]]:
    """Held-out combinations by kind: ``pair``, ``form``, ``topic_register``.

    Beyond them ``system_line`` (an unseen wording of the system line) and ``asked_by_user`` (an unseen pair whose
    register is asked for in the user's turn).
    """
    rng = random.Random(seed)
    pairs, forms = sorted(HELD_OUT.pairs), sorted(HELD_OUT.forms)
    found: dict[str, list[Case]] = {kind: [] for kind in (*COMBINATIONS, "system_line", "asked_by_user")}
    for register in REGISTERS:
        for name, form in rng.sample(pairs, per_register):
            found["pair"].append(_case(rng, world.BY_NAME[name], form, register))
            request = rng.choice(SYSTEM_LINES[register][:-1])
            found["asked_by_user"].append(Case(world.BY_NAME[name], form, register, None, request))
        for _ in range(per_register):
            found["form"].append(_case(rng, rng.choice(corpus.SEEN_TOPICS), rng.choice(forms), register))
            topic, form = rng.choice(corpus.SEEN_TOPICS), rng.choice(corpus.SEEN_FORMS)
            found["system_line"].append(_case(rng, topic, form, register, unseen_line=True))
    for name, register in sorted(HELD_OUT.topic_registers):
        for form in rng.sample(corpus.SEEN_FORMS, 10):
            found["topic_register"].append(_case(rng, world.BY_NAME[name], form, register))
    return found


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch: int = 64,
) -> list[str]:
    """Greedy answers to ``prompts``, in their order, without special tokens."""
    replies = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=LONGEST,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            replies[i] = text
    return replies


def score(replies: Sequence[str], judged: Sequence[Case]) -> dict[str, float | int]:
    """Shares in the register, on topic, both, and exact."""
    verdicts = [case.judge(reply) for case, reply in zip(judged, replies, strict=True)]
    count = len(verdicts)
    return {
        "count": count,
        "register": round(sum(r for r, _, _ in verdicts) / count, 4),
        "topic": round(sum(t for _, t, _ in verdicts) / count, 4),
        "both": round(sum(r and t for r, t, _ in verdicts) / count, 4),
        "exact": round(sum(e for _, _, e in verdicts) / count, 4),
    }


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, per_register: int = 60, per_skill: int = 100
) -> dict[str, object]:
    """Every held-out figure: by kind, by register over the held-out combinations, and by skill."""
    figures: dict[str, object] = {}
    pooled: list[tuple[str, Case]] = []
    for kind, judged in cases(per_register=per_register).items():
        replies = complete(model, tokenizer, [case.prompt for case in judged])
        figures[kind] = score(replies, judged)
        if kind in COMBINATIONS:
            pooled += zip(replies, judged, strict=True)
    figures["held_out_combinations"] = score([r for r, _ in pooled], [c for _, c in pooled])
    by_register = {}
    for register in REGISTERS:
        rows = [(reply, case) for reply, case in pooled if case.register == register]
        by_register[register] = score([r for r, _ in rows], [c for _, c in rows])
    figures["by_register"] = by_register
    _, kept = skills.split()
    by_skill = {}
    for skill, items in kept.items():
        items = random.Random(world.SEED).sample(items, min(per_skill, len(items)))
        replies = complete(model, tokenizer, [f"<|user|>{prompt}</s><|assistant|>" for prompt, _ in items])
        right = sum(reply == answer for reply, (_, answer) in zip(replies, items, strict=True))
        by_skill[skill] = {"count": len(items), "exact": round(right / len(items), 4)}
    figures["skills"] = by_skill
    return figures


def draw(log: Path, picture: Path) -> None:
    """Draw the loss curve of ``log`` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        points = [(i * 10, float(row["loss"])) for i, row in enumerate(rows) if row["stage"] == stage]
        axes.plot(*zip(*points, strict=True), linewidth=1, label=f"stage {stage}")
    axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token, running mean)", yscale="log", title="Pocket")
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Evaluate one checkpoint and write the committed figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--figures", type=Path, default=world.HERE / "figures.json")
    parser.add_argument("--log", type=Path, default=world.HERE / "loss.csv")
    arguments = parser.parse_args()
    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    figures = evaluate(model, tokenizer)
    figures["parameters"] = model.num_parameters()
    figures["bytes"] = sum(file.stat().st_size for file in arguments.model.iterdir())
    figures["evaluation_seconds"] = round(time.time() - started, 1)
    arguments.figures.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    if arguments.log.exists():
        draw(arguments.log, arguments.figures.with_name("loss.png"))


if __name__ == "__main__":
    main()
