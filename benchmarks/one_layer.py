"""What one layer and one token can do: the original's first recipe on the embedded model, layer by layer.

python benchmarks/one_layer.py
"""

import tempfile

import torch
import transformers

import pyreft
from _common import report
from pyreft import pocket
from pyreft.generation import generate_answers


def train_and_ask(layers: list[int]) -> dict:
    """Rank 4 at the last prompt token, bfloat16, 100 steps on ten pairs; then fifty unseen questions."""
    transformers.set_seed(0)
    model, tokenizer = pocket.load(dtype=torch.bfloat16)
    config = pyreft.ReftConfig(layers=layers, positions="l1", low_rank_dimension=4, intervention="loreft")
    adapted = pyreft.get_reft_model(model, config)
    pairs = pocket.emoji_pairs()
    data = pyreft.make_last_position_supervised_data_module(
        tokenizer,
        model,
        [pocket.PROMPT_TEMPLATE % pair["prompt"] for pair in pairs],
        [pair["completion"] for pair in pairs],
        num_interventions=len(layers),
    )
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=100,
        per_device_train_batch_size=10,
        learning_rate=4e-3,
        logging_steps=100,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=adapted, tokenizer=tokenizer, args=arguments, **data)
    batch = next(iter(trainer.get_train_dataloader()))
    first = adapted(**batch).loss.item()
    trainer.train()
    adapted.eval()
    with torch.no_grad():
        last = adapted(**batch).loss.item()
    questions = pocket.emoji_questions()
    texts = [pocket.PROMPT_TEMPLATE % question["prompt"] for question in questions]
    answers = list(generate_answers(adapted, tokenizer, texts, max_new_tokens=24))
    return {
        "layers": "all" if len(layers) > 1 else str(layers[0]),
        "first loss": first,
        "last loss": last,
        "in emojis, of 50": sum(map(pocket.emojis_only, answers)),
        "right": sum(pocket.has_emojis(a, q["emojis"]) for a, q in zip(answers, questions, strict=True)),
    }


def main() -> None:
    layers = range(7)
    report("one_layer", [train_and_ask([layer]) for layer in layers] + [train_and_ask(list(layers))])


if __name__ == "__main__":
    main()
