"""Programs in the manner of the original's examples, on the embedded model and on tiny random ones."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
)

import pyreft
from pyreft import pocket

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*trained parameters of the base model"),
]


@pytest.fixture
def base():
    return pocket.load()


def config(model, layers, intervention=pyreft.LoreftIntervention, rank=4):
    return pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": rank,
                "intervention": intervention(embed_dim=model.config.hidden_size, low_rank_dimension=rank),
            }
            for layer in layers
        ]
    )


def arguments(directory, **changes):
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 10,
        "learning_rate": 4e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 0,
    }
    return TrainingArguments(**defaults | changes)


def collator(tokenizer, model):
    return pyreft.ReftDataCollator(
        DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model, label_pad_token_id=-100, padding="longest")
    )


def train(model, tokenizer, rows, directory, **changes):
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model,
        tokenizer=tokenizer,
        args=arguments(directory, **changes),
        train_dataset=rows,
        data_collator=collator(tokenizer, model),
    )
    trainer.train()
    model.eval()
    return trainer


def answers(model, tokenizer, rows, max_new_tokens=24):
    """Greedy answers to the prompts of items, each edited at its own locations."""
    texts = []
    for row in rows:
        length = int((row["labels"] == -100).sum())
        prompt = {name: row[name][None, :length] for name in ("input_ids", "attention_mask")}
        places = [[at] for at in row["intervention_locations"]]
        _, tokens = model.generate(
            prompt,
            unit_locations={"sources->base": (None, places)},
            intervene_on_prompt=True,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        texts.append(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    return texts


# -- supervised finetuning with a data set of one's own ----------------------------------------------------------------


class EmojiDataset(pyreft.ReftDataset):
    def preprocess(self, kwargs):
        self.template = kwargs["prompt_template"]

    def load_dataset(self):
        self.raw_dataset = None
        return pocket.emoji_pairs()

    def tokenize(self, data_item):
        prompt = self.template % data_item["prompt"]
        text = prompt + data_item["completion"] + self.tokenizer.eos_token
        length = len(self.tokenizer(prompt, return_tensors="pt")["input_ids"][0])
        result = {"input_ids": self.tokenizer(text, return_tensors="pt")["input_ids"][0]}
        result["labels"] = result["input_ids"].clone()
        result["labels"][:length] = -100
        return result, length


def test_a_data_set_of_ones_own(base, tmp_path):
    model, tokenizer = base
    layers = [1, 2, 3]
    rows = EmojiDataset(
        "emoji", None, tokenizer, num_interventions=3, position="l4", prompt_template=pocket.PROMPT_TEMPLATE
    )
    reft_model = pyreft.get_reft_model(model, config(model, layers))
    before = answers(reft_model, tokenizer, rows)
    train(reft_model, tokenizer, rows, tmp_path, num_train_epochs=60, learning_rate=1e-2)
    wanted = [pair["completion"] for pair in pocket.emoji_pairs()]
    assert sum(map(pocket.emojis_only, before)) <= 1
    assert sum(map(str.__eq__, answers(reft_model, tokenizer, rows), wanted)) >= 8


# -- instruction tuning ------------------------------------------------------------------------------------------------


def instructions():
    words = ["cat", "dog", "sun", "sea", "tree", "moon", "bird", "fish"]
    return [{"instruction": "Say it.", "input": word, "output": f"It is the {word}."} for word in words[:4]] + [
        {"instruction": f"Name a {word}.", "input": "", "output": f"A {word}, yes."} for word in words[4:]
    ]


def test_instruction_tuning(base, tmp_path):
    model, tokenizer = base
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(instructions()))
    layers = [2, 3, 4] * 2
    rows = pyreft.ReftSupervisedDataset(
        "alpaca",
        str(path),
        tokenizer,
        data_split="train",
        seed=42,
        max_n_example=None,
        input_field="input",
        instruction_field="instruction",
        output_field="output",
        num_interventions=len(layers),
        position="f2+l6",
        share_weights=False,
    )
    reft_model = pyreft.get_reft_model(model, config(model, layers))
    train(reft_model, tokenizer, rows, tmp_path, num_train_epochs=80, learning_rate=1e-2)
    wanted = [row["output"] for row in instructions()]
    assert sum(map(str.__eq__, answers(reft_model, tokenizer, rows), wanted)) >= 6


# -- classification ----------------------------------------------------------------------------------------------------

GOOD, BAD, OTHER = range(10, 15), range(20, 25), range(30, 40)


def tiny_roberta(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    return RobertaForSequenceClassification(
        RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, **changes)
    ).eval()


class WordsDataset(pyreft.ReftDataset):
    """Rows of ids: more good words than bad ones, or fewer."""

    def preprocess(self, kwargs):
        self.pad_mode = "last"
        self.fields_to_pad = ["input_ids"]

    def tokenize(self, data_item):
        ids = torch.tensor(data_item["words"])
        return {"input_ids": ids, "labels": data_item["label"]}, len(ids)


def words(number, seed, label):
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        good = bool(draw.integers(2))
        told = draw.choice(GOOD if good else BAD, 5).tolist()
        rows.append({"words": [2, *draw.permutation(told + draw.choice(OTHER, 3).tolist()).tolist(), 3]})
        rows[-1]["label"] = label(good)
    return rows


def classifier(tokenizer, directory, label, config_changes, **changes):
    model = tiny_roberta(**config_changes)
    representations = [
        {
            "component": f"roberta.encoder.layer[{layer}].output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4),
        }
        for layer in range(2)
    ]
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=True)
    for param in reft_model.model.classifier.parameters():
        param.requires_grad = True
    rows = {
        seed: WordsDataset(
            "words", None, tokenizer, dataset=words(number, seed, label), num_interventions=2, position="f3"
        )
        for seed, number in ((0, 256), (1, 64))
    }
    options = {
        "num_train_epochs": 8,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }
    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=reft_model,
        tokenizer=tokenizer,
        args=arguments(directory, **options | changes),
        train_dataset=rows[0],
        eval_dataset=rows[1],
        data_collator=pyreft.ReftDataCollator(DataCollatorWithPadding(tokenizer, padding="longest")),
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
            if p.label_ids.ndim == 1 and p.predictions.shape[-1] > 1
            else float(((p.predictions.squeeze() > p.label_ids.mean()) == (p.label_ids > p.label_ids.mean())).mean())
        },
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    return trainer, before


def test_classification(base, tmp_path):
    trainer, before = classifier(base[1], tmp_path, int, {"num_labels": 2}, metric_for_best_model="accuracy")
    evaluations = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(evaluations) == 8
    assert before < 0.7
    assert max(evaluations) > 0.9
    assert trainer.evaluate()["eval_accuracy"] == max(evaluations)  # edits and head are those of the best epoch

    trainer.model.save(tmp_path / "saved")
    batch = next(iter(trainer.get_eval_dataloader()))
    call = {name: batch[name] for name in ("input_ids", "attention_mask", "intervention_locations")}
    with torch.no_grad():
        wanted = trainer.model.eval()(**call).logits
        for directory in (tmp_path / "saved", trainer.state.best_model_checkpoint):
            for load in (lambda m, d: pyreft.ReftModel.load(d, m), PeftModel.from_pretrained):
                assert torch.equal(load(tiny_roberta(num_labels=2), directory)(**call).logits, wanted)


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        (lambda good: 4.5 if good else 1.0, {"num_labels": 1}),
        (lambda good: 4 if good else 1, {"num_labels": 1}),
        (lambda good: [int(good), int(not good)], {"num_labels": 2, "problem_type": "multi_label_classification"}),
    ],
)
def test_regression_and_several_labels(base, tmp_path, label, changes):
    trainer, before = classifier(base[1], tmp_path, label, changes, metric_for_best_model="loss", num_train_epochs=12)
    assert before < 0.7
    assert trainer.evaluate()["eval_accuracy"] > 0.9


# -- preferences -------------------------------------------------------------------------------------------------------


def test_preferences(base, tmp_path):
    model, tokenizer = base
    pairs = [
        {"instruction": f"Tell me of the {word}.", "chosen_output": "Gladly!", "rejected_output": f"The {word} is old."}
        for word in ("cat", "dog", "sun", "sea", "tree", "moon", "bird", "fish")
    ]

    def rows(dataset):
        return pyreft.ReftPreferenceDataset(
            "pairs", None, tokenizer, dataset=dataset, num_interventions=2, position="l4", substitute=False
        )

    reft_model = pyreft.get_reft_model(model, config(model, [2, 3]))
    train(reft_model, tokenizer, rows(pairs[:5]), tmp_path, num_train_epochs=40, learning_rate=1e-2)
    assert answers(reft_model, tokenizer, rows(pairs[5:])) == ["Gladly!"] * 3


# -- a reward model ----------------------------------------------------------------------------------------------------


class RewardTrainer(pyreft.ReftTrainer):
    def compute_loss(self, intervenable, inputs, return_outputs=False):
        rewards = intervenable(
            {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
            unit_locations={"sources->base": (None, inputs["intervention_locations"].permute(1, 0, 2).tolist())},
            subspaces=None,
        )[-1].logits
        loss = -functional.logsigmoid(rewards[::2] - rewards[1::2]).mean()
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        differences = (outputs["rewards"][::2] - outputs["rewards"][1::2]).detach().cpu()
        return loss.detach().cpu(), differences, torch.ones_like(differences)


@torch.inference_mode()
def evaluate_rewards(directory, tokenizer, rows, pad):
    """Load and evaluate as the example does."""
    model = reward_base(tokenizer)
    reft_model = pyreft.ReftModel.load(directory, model)
    reft_model.set_device("cpu")
    trainer = RewardTrainer(
        model=reft_model,
        tokenizer=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.reshape(-1) > 0).mean())},
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=pad,
        args=arguments(directory.parent / "eval", per_device_eval_batch_size=2),
    )
    return trainer.evaluate()


def reward_base(tokenizer):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(pocket.path(), num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def conversations(things):
    for number, thing in enumerate(things):
        kind, rude = f"I like the {thing}.", f"I hate the {thing}."
        first, second = (kind, rude) if number % 2 else (rude, kind)
        chats = [[{"role": "user", "content": "Talk."}, {"role": "assistant", "content": a}] for a in (first, second)]
        yield {"conv_A": chats[0], "conv_B": chats[1], "A": float(number % 2), "B": float(not number % 2)}


def test_a_reward_model(base, tmp_path):
    tokenizer = base[1]
    things = ["cat", "dog", "sun", "sea", "tree", "moon", "bird", "fish", "frog", "boat", "star", "fox"]
    train_rows, test_rows = (
        pyreft.ReftRewardDataset(
            "reward",
            None,
            tokenizer,
            dataset=list(conversations(part)),
            conv_A_field="conv_A",
            conv_B_field="conv_B",
            conv_A_reward_field="A",
            conv_B_reward_field="B",
            num_interventions=4,
            position="f1+l1",
            share_weights=False,
        )
        for part in (things[:8], things[8:])
    )
    reft_model = pyreft.get_reft_model(reward_base(tokenizer), config(reward_base(tokenizer), [2, 4, 2, 4]))
    for param in reft_model.model.score.parameters():
        param.requires_grad = True
    pad = pyreft.ReftRewardCollator(tokenizer=tokenizer, padding=True, max_length=tokenizer.model_max_length)
    trainer = RewardTrainer(
        model=reft_model,
        tokenizer=tokenizer,
        args=arguments(tmp_path, num_train_epochs=15, per_device_train_batch_size=4),
        train_dataset=train_rows,
        data_collator=pad,
    )
    trainer.train()
    trainer.save_model(tmp_path / "reward")
    batch = pad([test_rows[i] for i in range(len(test_rows))])
    assert batch.pop("reward").tolist() == [1.0, 0.0] * 4
    with torch.no_grad():
        rewards = reft_model.eval()(**batch).logits
        again = pyreft.ReftModel.load(tmp_path / "reward", reward_base(tokenizer))(**batch).logits
    assert ((rewards[::2] - rewards[1::2]) > 1).all()
    assert torch.equal(rewards, again)
    found = evaluate_rewards(tmp_path / "reward", tokenizer, test_rows, pad)
    assert found["eval_accuracy"] == 1
    assert found["eval_loss"] == pytest.approx(
        -functional.logsigmoid(rewards[::2] - rewards[1::2]).mean().item(), abs=1e-5
    )


# -- memory ------------------------------------------------------------------------------------------------------------

# about as long as one vector of 192 numbers can make so small a model say
TEXT = "People like rain because it is round and peaceful."


def test_one_vector_remembers_a_text(base, tmp_path):
    model, tokenizer = base
    torch.manual_seed(0)
    reft_model = pyreft.get_reft_model(model, config(model, [0], pyreft.ConsreftIntervention, rank=1))
    assert reft_model.count_parameters() == model.config.hidden_size + 1
    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer, model, [pocket.PROMPT_TEMPLATE % "GO"], [TEXT]
    )
    trainer = pyreft.ReftTrainerForCausalLM(
        model=reft_model,
        tokenizer=tokenizer,
        args=arguments(tmp_path, num_train_epochs=400, learning_rate=0.5, max_grad_norm=0),
        **data_module,
    )
    trainer.train()
    prompt = tokenizer(pocket.PROMPT_TEMPLATE % "GO", return_tensors="pt")
    last = prompt["input_ids"].shape[-1] - 1
    before, after = reft_model.eval().generate(
        prompt,
        unit_locations={"sources->base": (None, [[[last]]])},
        intervene_on_prompt=True,
        output_original_output=True,
        max_new_tokens=32,
        do_sample=False,
    )
    assert tokenizer.decode(after[0, last + 1 :], skip_special_tokens=True) == TEXT
    assert "rain" not in tokenizer.decode(before[0])


# -- two skills in two subspaces -----------------------------------------------------------------------------------


def test_two_skills_trained_apart_are_switched_on_together(base, tmp_path):
    model, tokenizer = base
    place = {"layer": 2, "component": "block_output", "intervention": "nodireft", "low_rank_dimension": 4}
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place))
    (intervention,) = reft_model.interventions.values()
    pairs = [(2, 3), (4, 8), (7, 3), (2, 2), (6, 5), (8, 7), (3, 3), (5, 9), (9, 6), (4, 4), (5, 2), (7, 7)]
    pairs += [(3, 8), (6, 2), (2, 9), (9, 9), (8, 4), (3, 5), (7, 6), (5, 5)]
    sums = [pocket.PROMPT_TEMPLATE % f"What is {a} plus {b}?" for a, b in pairs]
    emojis = pocket.emoji_pairs()
    skills = {
        (0, 1): ([pocket.PROMPT_TEMPLATE % e["prompt"] for e in emojis], [e["completion"] for e in emojis]),
        (2, 3): (sums[:10], [f"{a + b}!" for a, b in pairs[:10]]),
    }
    for directions, (prompts, completions) in skills.items():
        before = {name: p.detach().clone() for name, p in intervention.named_parameters()}
        data_module = pyreft.make_multiple_position_supervised_data_module(
            tokenizer, model, prompts, completions, positions="f0+l4"
        )
        rows = data_module["train_dataset"]
        data_module["train_dataset"] = rows.add_column("subspaces", [[list(directions)]] * len(rows))
        settings = arguments(tmp_path, num_train_epochs=60, learning_rate=0.005, remove_unused_columns=True)
        pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=settings, **data_module).train()
        others = [direction for direction in range(4) if direction not in directions]
        for name, parameter in intervention.named_parameters():
            assert torch.equal(parameter[others], before[name][others])  # the other skill is as it was
            assert not torch.equal(parameter[list(directions)], before[name][list(directions)])
    reft_model.eval()
    tokenizer.padding_side = "left"
    questions = [pocket.PROMPT_TEMPLATE % pair["prompt"] for pair in pocket.emoji_questions()[:20]]

    def count(directions):
        """How many unseen questions are answered in emojis, and how many unseen sums with a cry."""
        found = []
        for prompts in (questions, sums[10:]):
            batch = tokenizer(prompts, padding=True, return_tensors="pt")
            width = batch["input_ids"].shape[1]
            _, tokens = reft_model.generate(
                batch,
                unit_locations={"sources->base": (None, [[[width - 4 + at for at in range(4)]] * len(prompts)])},
                subspaces={"sources->base": (None, [[directions] * len(prompts)])},
                max_new_tokens=16,
                do_sample=False,
            )
            found.append(tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True))
        return sum(map(pocket.emojis_only, found[0])), sum(text.endswith("!") for text in found[1])

    assert count([]) == (0, 0)
    assert count([0, 1]) == (pytest.approx(18, abs=3), 0)
    assert count([2, 3]) == (0, pytest.approx(9, abs=3))
    assert count([0, 1, 2, 3]) == (pytest.approx(13, abs=3), pytest.approx(8, abs=3))


# -- with LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["grads kept", "grads enabled again"])
def test_lora_and_reft_in_one_model(base, tmp_path, way):
    model, tokenizer = base
    peft_config = LoraConfig(
        r=4, lora_alpha=32, target_modules=["o_proj"], layers_to_transform=[2], use_rslora=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, peft_config)
    reft_config = pyreft.ReftConfig(
        representations=[
            {
                "layer": 2,
                "component": "base_model.model.model.layers[2].output",
                "low_rank_dimension": 4,
                "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
            }
        ]
    )
    reft_model = pyreft.get_reft_model(model, reft_config, disable_model_grads=way != "grads kept")
    if way != "grads kept":
        reft_model.model.enable_adapter_layers()
    start = {name: p.detach().clone() for name, p in reft_model.named_parameters()}
    pairs = pocket.emoji_pairs()
    prompts = [pocket.PROMPT_TEMPLATE % pair["prompt"] for pair in pairs]
    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer, model, prompts, [pair["completion"] for pair in pairs]
    )
    trainer = pyreft.ReftTrainerForCausalLM(
        model=reft_model, tokenizer=tokenizer, args=arguments(tmp_path, num_train_epochs=40), **data_module
    )
    trainer.train()
    changed = {name for name, p in reft_model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if "lora_" in name or "reft_" in name}

    model.save_pretrained(tmp_path / "lora")
    reft_model.eval().save(tmp_path / "reft")
    fresh = PeftModel.from_pretrained(pocket.load()[0], tmp_path / "lora")
    loaded = pyreft.ReftModel.load(tmp_path / "reft", fresh)
    prompt = tokenizer(prompts[0], return_tensors="pt")
    call = {"unit_locations": {"sources->base": (None, [[[prompt["input_ids"].shape[-1] - 1]]])}}
    with torch.no_grad():
        assert torch.equal(loaded(prompt, **call)[1].logits, reft_model(prompt, **call)[1].logits)
    tokens = [m.generate(prompt, **call, max_new_tokens=16, do_sample=False)[1] for m in (reft_model, loaded)]
    assert torch.equal(*tokens)
    assert pocket.emojis_only(tokenizer.decode(tokens[0][0, prompt["input_ids"].shape[-1] :], skip_special_tokens=True))
