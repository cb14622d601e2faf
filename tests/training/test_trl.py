"""TRL's trainers take a `ReftConfig` as `peft_config`, and what they train gets better at unseen questions.

Supervised training keeps TRL's defaults, bfloat16 and gradient checkpointing. The embedded model learns to answer in
emojis, which it never does by itself; from examples, from preferences, or by a reward.
"""

import re

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pyreft
from pyreft import pocket
from pyreft.generation import generate_answers
from pyreft.reach import Reach, ReachCallback
from pyreft.reach.layers import SkipLayers
from pyreft.reach.prefixes import SkipPrefixes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.* is deprecated:FutureWarning"),
]
CONFIG = {"intervention": "loreft", "layers": [1, 2, 3], "positions": "l4", "low_rank_dimension": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load()[1]


def prompts_of(rows):
    return [pocket.PROMPT_TEMPLATE % row["prompt"] for row in rows]


TRAIN, HELD_OUT = prompts_of(pocket.emoji_pairs()), prompts_of(pocket.emoji_questions())


@pytest.fixture(scope="module")
def preferences(tokenizer):
    """Emojis rather than what the model says by itself: to train on, and about other topics."""
    model = pocket.load()[0]
    chosen = ([row["completion"] for row in pocket.emoji_pairs()], [row["answer"] for row in pocket.emoji_questions()])
    return [
        Dataset.from_dict(
            {
                "prompt": prompts,
                "chosen": emojis,
                "rejected": list(generate_answers(model, tokenizer, prompts, max_new_tokens=24)),
            }
        )
        for prompts, emojis in zip((TRAIN, HELD_OUT), chosen, strict=True)
    ]


def options(directory, **changes):
    return {
        "output_dir": str(directory),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
    } | changes


def in_emojis(model, tokenizer):
    """How many of the fifty unseen questions are answered in emojis; none by the model alone."""
    return sum(map(pocket.emojis_only, generate_answers(model.eval(), tokenizer, HELD_OUT, max_new_tokens=16)))


@pytest.mark.parametrize(
    "form",
    [{}, {"padding_free": True, "max_length": None, "bf16": False}, {"packing": True, "max_length": 64, "bf16": False}],
    ids=str,
)
def test_sft(tokenizer, tmp_path, form):
    rows = {"prompt": TRAIN, "completion": [row["completion"] for row in pocket.emoji_pairs()]}
    trainer = trl.SFTTrainer(
        model=pocket.load()[0],
        processing_class=tokenizer,
        args=trl.SFTConfig(**options(tmp_path, per_device_train_batch_size=10, max_steps=20), **form),
        train_dataset=Dataset.from_dict(rows),
        peft_config=pyreft.ReftConfig(**CONFIG),
    )
    assert ("position_ids" in next(iter(trainer.get_train_dataloader()))) is bool(form)
    trainer.train()
    assert in_emojis(trainer.model, tokenizer) >= 40
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    expected = peft.get_peft_model_state_dict(trainer.model)
    assert expected
    for name, value in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, expected[name])
    assert in_emojis(loaded, tokenizer) == in_emojis(trainer.model, tokenizer)


def test_packed_rows_train_what_padded_ones_do(tokenizer, tmp_path):
    """To rounding, in float32; and with rules that take the beginning and the end of each prompt."""
    losses = []
    rows = {"prompt": TRAIN, "completion": [row["completion"] for row in pocket.emoji_pairs()]}
    for form in ({}, {"padding_free": True, "max_length": None}):
        torch.manual_seed(0)
        arguments = options(tmp_path, per_device_train_batch_size=5, max_steps=6, bf16=False)
        trainer = trl.SFTTrainer(
            model=pocket.load()[0],
            processing_class=tokenizer,
            args=trl.SFTConfig(**arguments, **form),
            train_dataset=Dataset.from_dict(rows),
            peft_config=pyreft.ReftConfig(positions="f2+l3", low_rank_dimension=4, intervention="loreft"),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_dpo(tokenizer, tmp_path, preferences):
    train, held_out = preferences
    trainer = trl.DPOTrainer(
        model=pocket.load()[0],
        processing_class=tokenizer,
        args=trl.DPOConfig(**options(tmp_path, per_device_train_batch_size=10, max_steps=16, bf16=False)),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=pyreft.ReftConfig(**CONFIG),
    )
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] > 0.95
    assert after["eval_rewards/margins"] > 2
    assert in_emojis(trainer.model, tokenizer) >= 15


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained")
def test_dpo_goes_on_from_an_adapter_and_holds_it_as_the_reference(tokenizer, tmp_path, preferences):
    """TRL copies a trained adapter to a second one, `ref`, by the names of its parameters."""
    torch.manual_seed(0)
    model = pyreft.get_reft_model(pocket.load()[0], pyreft.ReftConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.get_trainable_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = [parameter.clone() for parameter in model.get_trainable_parameters()]
    trainer = trl.DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=trl.DPOConfig(**options(tmp_path, per_device_train_batch_size=10, max_steps=2)),
        train_dataset=preferences[0],
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    named = dict(trainer.model.named_parameters())
    trained = [parameter for name, parameter in named.items() if ".default." in name]
    held = [parameter for name, parameter in named.items() if ".ref." in name]
    for first, reference, last in zip(before, held, trained, strict=True):
        assert torch.equal(first, reference)
        assert not torch.equal(first, last)


def unpaired(pairs):
    rows = [(row["prompt"], row[kind], kind == "chosen") for row in pairs for kind in ("chosen", "rejected")]
    return Dataset.from_dict(
        dict(zip(("prompt", "completion", "label"), map(list, zip(*rows, strict=True)), strict=True))
    )


def test_kto(tokenizer, tmp_path, preferences):
    trainer = trl.KTOTrainer(
        model=pocket.load()[0],
        processing_class=tokenizer,
        args=trl.KTOConfig(**options(tmp_path, per_device_train_batch_size=20, max_steps=16, bf16=False)),
        train_dataset=unpaired(preferences[0]),
        eval_dataset=unpaired(preferences[1]),
        peft_config=pyreft.ReftConfig(**CONFIG),
    )
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 2
    assert in_emojis(trainer.model, tokenizer) >= 25


def test_reward(tmp_path, tokenizer, preferences):
    train, held_out = preferences
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(pocket.path(), num_labels=1, dtype=torch.float32),
        processing_class=tokenizer,
        args=trl.RewardConfig(**options(tmp_path, per_device_train_batch_size=10, max_steps=10, bf16=False)),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=pyreft.ReftConfig(**CONFIG),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.9
    assert after["eval_accuracy"] > 0.95
    assert after["eval_margin"] > before["eval_margin"] + 1


def test_grpo(tokenizer, tmp_path):
    """A reward for few words, up to what the model reaches in a dozen steps; measured on unseen questions, too."""

    def brief(completions, **columns):
        return [-len(completion.split()) / 10 for completion in completions]

    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=brief,
        args=trl.GRPOConfig(
            **options(tmp_path, per_device_train_batch_size=40, max_steps=14, learning_rate=0.02, bf16=False),
            num_generations=8,
            max_completion_length=16,
        ),
        train_dataset=Dataset.from_dict({"prompt": TRAIN}),
        peft_config=pyreft.ReftConfig(**CONFIG),
    )
    before = list(generate_answers(pocket.load()[0], tokenizer, HELD_OUT, max_new_tokens=16))
    trainer.train()
    after = list(generate_answers(trainer.model.eval(), tokenizer, HELD_OUT, max_new_tokens=16))
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15
    assert sum(brief(after)) / 50 > sum(brief(before)) / 50 + 0.15


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO"])
def test_what_the_edits_can_reach_is_enough(kind, tokenizer, tmp_path, preferences):
    """Losses and whatever else is logged, in evaluations, too, are those of whole rows, to rounding in float32."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "bf16": False, "gradient_checkpointing": False}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    data = [rows.select(range(8)) for rows in preferences]
    if kind == "SFT":
        data = [rows.rename_column("chosen", "completion").remove_columns("rejected") for rows in data]
    elif kind == "KTO":
        data = [unpaired(rows) for rows in data]
    elif kind == "GRPO":
        settings |= {"num_generations": 2, "max_completion_length": 8, "learning_rate": 1e-3}
    logs = []
    for in_part in (False, True):
        torch.manual_seed(0)
        more = {"reward_funcs": lambda completions, **_: list(map(float, map(len, completions)))}
        trainer = getattr(trl, f"{kind}Trainer")(
            model=pocket.load()[0],
            processing_class=tokenizer,
            args=getattr(trl, f"{kind}Config")(**options(tmp_path, **settings)),
            train_dataset=data[0],
            eval_dataset=data[1],
            peft_config=pyreft.ReftConfig(**CONFIG, task_type="CAUSAL_LM"),
            **more if kind == "GRPO" else {},
        )
        if in_part:
            reach = (served := ReachCallback(trainer.model)).reach
            trainer.add_callback(served)
        trainer.train()
        logs.append(trainer.state.log_history[:-1])  # but for how long it took
    assert isinstance(reach._way, SkipPrefixes)
    assert reach._way.computed < 0.9 * reach._way.tokens
    for whole, part in zip(*logs, strict=True):
        timed = {name for name in whole if re.search("runtime|per_second|step_time", name)}
        values = [{name: value for name, value in log.items() if name not in timed} for log in (whole, part)]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-4)
    assert len(logs[0]) > 6


def test_a_head_that_is_trained_beside_the_edits(tokenizer, tmp_path):
    """Then the blocks below the edits are left out, for whole rows."""
    losses = []
    for in_part in (False, True):
        torch.manual_seed(0)
        settings = {"per_device_train_batch_size": 5, "max_steps": 4, "bf16": False, "gradient_checkpointing": False}
        trainer = trl.SFTTrainer(
            model=pocket.load()[0],
            processing_class=tokenizer,
            args=trl.SFTConfig(**options(tmp_path, **settings)),
            train_dataset=Dataset.from_dict({"prompt": TRAIN, "completion": TRAIN}),
            peft_config=pyreft.ReftConfig(**CONFIG, task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
        )
        if in_part:
            trainer.add_callback(served := ReachCallback(trainer.model))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert isinstance(served.reach._way, SkipLayers)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_model_without_a_task_is_not_served():
    model = peft.get_peft_model(pocket.load()[0], pyreft.ReftConfig(**CONFIG))
    with pytest.raises(pyreft.ReftError, match="Give task_type='CAUSAL_LM' to the ReftConfig"):
        Reach(model)
