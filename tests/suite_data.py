"""Small data in the published layouts of the paper's suites, and a tiny encoder to classify with."""

import json
import random

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from pyreft import pocket

CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def commonsense(root, count=24):
    """As in LLM-Adapters; the right answer is always the second choice, so that a little training can find it."""
    rows = {
        task: [
            {
                "instruction": f"Please choose the correct answer: {n}?\n\nAnswer format: {'/'.join(of)}",
                "input": "",
                "output": f"the correct answer is {of[1]}",
                "answer": of[1],
            }
            for n in range(count)
        ]
        for task, of in CHOICES.items()
    }
    for task, of_task in rows.items():
        write_json(root / "dataset" / task / "test.json", of_task[:3])
    write_json(root / "ft-training_set" / "commonsense_170k.json", [r for of in rows.values() for r in of[3:]])
    return root


def arithmetic(root, count=24):
    """Sums as in LLM-Adapters, with GSM8K in its own JSON Lines."""
    rows = [
        {"instruction": f"What is {n} + 1?", "input": "", "output": f"The answer is {n + 1}."} for n in range(count)
    ]
    write_json(root / "math_10k.json", [row | {"answer": str(n + 1)} for n, row in enumerate(rows)])
    for task in ("mawps", "SVAMP"):
        write_json(root / task / "test.json", [row | {"answer": [n + 1.0]} for n, row in enumerate(rows[:3])])
    choices = [{"instruction": "2 + 2? Answer Choices: (A) 1 (B) 4", "input": "", "output": "", "answer": "B"}]
    write_json(root / "AQuA" / "test.json", choices)
    lines = [{"question": f"What is {n} + 1?", "answer": f"One adds.\n#### {n + 1}"} for n in range(3)]
    (root / "gsm8k").mkdir()
    (root / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def instruct(root):
    rows = [{"instruction": p["prompt"], "input": "", "output": p["completion"]} for p in pocket.emoji_pairs()]
    write_json(root / "ultrafeedback" / "train.json", rows)
    asked = [{"instruction": q["prompt"], "output": "", "dataset": "pocket"} for q in pocket.emoji_questions()[:3]]
    write_json(root / "alpaca_eval" / "test.json", asked)
    return root


HEADERS = {
    "MNLI": "index sentence1 sentence2 label1 gold_label",
    "SST-2": "sentence label",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QNLI": "index question sentence label",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "RTE": "index sentence1 sentence2 label",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}
CLASSES = {
    "MNLI": ("entailment", "neutral", "contradiction"),
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
}
NAMES = {"mnli": "MNLI", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE"}
NAMES["stsb"] = "STS-B"


def glue_line(folder, number, random_):
    """A line whose label the words of the first sentence tell."""
    label = number % len(CLASSES.get(folder, (0, 1)))
    first = " ".join([("oak", "cat", "whale")[label]] * random_.randint(3, 5))
    shown = f"{label * 2.5}" if folder == "STS-B" else CLASSES.get(folder, ("0", "1"))[label]
    if folder == "CoLA":
        return f"gj04\t{shown}\t\t{first}"
    header = HEADERS[folder].replace(" ", "\t") if folder != "MRPC" else HEADERS[folder]
    cells = []
    for column in header.split("\t"):
        if column in ("sentence1", "question", "question1", "#1 String") or (column, folder) == ("sentence", "SST-2"):
            cells.append(first)
        elif column in ("sentence2", "sentence", "question2", "#2 String"):
            cells.append('a "dog')  # quotes mean nothing in these files
        else:
            cells.append(shown if column in ("gold_label", "label", "Quality", "is_duplicate", "score") else "x")
    return "\t".join(cells)


def glue(root, names=NAMES, train=32, validation=8):
    random_ = random.Random(0)
    for folder in (NAMES[name] for name in names):
        (root / folder).mkdir(parents=True)
        head = [] if folder == "CoLA" else [HEADERS[folder].replace(" ", "\t")]
        if folder == "MRPC":
            head = [HEADERS[folder]]
        for file, count in (("train", train), ("dev_matched" if folder == "MNLI" else "dev", validation)):
            lines = [*head, *(glue_line(folder, number, random_) for number in range(count))]
            (root / folder / f"{file}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def tiny_roberta(directory):
    """Save a random encoder as a masked language model, as RoBERTa is published, with the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = pocket.load()[1]
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    RobertaForMaskedLM(config).save_pretrained(directory)
    tokenizer.model_max_length = 60
    tokenizer.save_pretrained(directory)
    return directory
