"""Pocket: what ships, how it tokenises, what pretraining was kept from, and that it answers."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyreft import pocket
from pyreft.pocket.judge import is_emoji

TOOLS = Path(__file__).parents[1] / "tools" / "pocket"
TOOL_MODULES = ("corpus", "evaluate", "pretrain", "skills", "tokenizer", "world")


@pytest.fixture(scope="module")
def tools() -> Iterator[None]:
    """Make the modules of ``tools/pocket`` importable, for this file alone."""
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))
    for name in TOOL_MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pocket.load()[0]


TOKENIZER = AutoTokenizer.from_pretrained(pocket.path())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.path())


def test_limits(model: PreTrainedModel) -> None:
    assert model.num_parameters() <= 4_000_000
    assert sum(file.stat().st_size for file in Path(pocket.path()).rglob("*")) <= 8_000_000
    assert model.config.max_position_embeddings >= 256
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings


def test_import_is_light() -> None:
    code = "import sys, pyreft; old = set(sys.modules); import pyreft.pocket as p; p.path(); p.emoji_pairs()"
    code += "; known = {'pyreft', *sys.stdlib_module_names}"
    code += "; print(sorted(name for name in set(sys.modules) - old if name.split('.')[0] not in known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_load_dtype(dtype: torch.dtype | None, expected: torch.dtype) -> None:
    model, _ = pocket.load(dtype=dtype)
    assert model.dtype == expected
    assert not model.training


def test_weights_are_stored_in_bfloat16() -> None:
    assert AutoModelForCausalLM.from_pretrained(pocket.path(), dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("use_fast", [True, False])
def test_tokenizer_loads(use_fast: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.path(), use_fast=use_fast)
    tokenizer.pad_token = tokenizer.unk_token
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert tokenizer("a cat")["input_ids"] == TOKENIZER("a cat")["input_ids"]


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    names = ["<unk>", "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 3)
    ids = tokenizer("What is a cat?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip(text: str) -> None:
    if any(token in text for token in TOKENIZER.all_special_tokens):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "text", ["", " a", "a ", "  two  spaces , kept .", "can 't", "tab\tand\nline", "🐱🐾 été 漢字", "12+30"]
)
def test_round_trip_by_hand(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text


def test_chat_template_is_the_prompt_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What is a cat?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.bos_token + pocket.PROMPT_TEMPLATE % "What is a cat?"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(pocket.PROMPT_TEMPLATE % "What is a cat?")["input_ids"]
    whole = [{"role": "system", "content": "Answer in emojis."}, *messages, {"role": "assistant", "content": "🐱"}]
    expected = "<s><|system|>Answer in emojis.</s><|user|>What is a cat?</s><|assistant|>🐱</s>"
    assert tokenizer.apply_chat_template(whole, tokenize=False) == expected


@pytest.mark.usefixtures("tools")
def test_answers_follow_their_own_rules() -> None:
    import world

    assert len(world.TOPICS) >= 150
    assert len({topic.emojis for topic in world.TOPICS}) == len(world.TOPICS)
    for topic in world.TOPICS:
        for aspect in world.ASPECTS:
            for register in world.REGISTERS:
                text = world.answer(topic, aspect, register)
                assert world.register_of(text) == register, text
                assert world.on_topic(text, topic, aspect), text


@pytest.mark.usefixtures("tools")
def test_judges_agree() -> None:
    import world

    for topic in world.TOPICS:
        assert pocket.emojis_only(world.answer(topic, "what", "emoji"))
        assert not pocket.emojis_only(world.answer(topic, "what"))


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("stage", [0, 1])
def test_corpus_is_deterministic_and_clean(stage: int) -> None:
    import corpus
    import skills
    import world

    sample = list(corpus.documents(seed=world.SEED + 1, count=60_000, stage=stage))
    assert sample[:2000] == list(corpus.documents(seed=world.SEED + 1, count=2000, stage=stage))
    questions = {turn.split("</s>")[0] for text in sample for turn in text.split("<|user|>")[1:]}
    held = {form.format(x=world.BY_NAME[name].x) for name, form in world.HELD_OUT.pairs}
    held |= {form.format(x=topic.x) for form in world.HELD_OUT.forms for topic in world.TOPICS}
    held |= {item["prompt"] for item in (*pocket.emoji_pairs(), *pocket.emoji_questions())}
    held |= {prompt for items in skills.split()[1].values() for prompt, _ in items}
    bare = {question.removeprefix(opener) for question in questions for opener in ("", *corpus.OPENERS)}
    lines = [f" {line}" for lines in world.SYSTEM_LINES.values() for line in lines]
    bare |= {question.removesuffix(line) for question in bare for line in lines}
    assert not bare & held
    everything = "\n".join(sample)
    assert not any(line in everything for line in world.HELD_OUT.system_lines)
    assert not any(f" {name}" in everything for name in world.HELD_OUT.topics)
    for name, register in world.HELD_OUT.topic_registers:
        topic = world.BY_NAME[name]
        assert not any(world.answer(topic, aspect, register) in everything for aspect in world.ASPECTS)


@pytest.mark.usefixtures("tools")
def test_committed_record_is_current() -> None:
    import corpus

    assert json.loads((TOOLS / "held_out.json").read_text(encoding="utf-8")) == corpus.held_out_record()
    assert json.loads(corpus.STUDY_TASKS.read_text(encoding="utf-8")) == corpus.study_record()
    train, test = corpus.emoji_sets()
    assert len(pocket.emoji_pairs()) == len(train) == 10
    assert len(pocket.emoji_questions()) == len(test) == 50
    assert len({topic.name for topic, _ in train + test}) == 60
    for row, (topic, form) in zip(pocket.emoji_questions(), test, strict=True):
        assert row["prompt"] == form.format(x=topic.x)
        assert pocket.has_emojis(row["answer"], row["emojis"])


@pytest.mark.usefixtures("tools")
def test_held_out_combinations_are_answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    import evaluate

    found = evaluate.cases(per_register=12)
    judged = found["pair"] + found["form"] + random.Random(0).sample(found["topic_register"], 60)
    replies = evaluate.complete(model, tokenizer, [case.prompt for case in judged])
    assert evaluate.score(replies, judged)["both"] >= 0.85


@pytest.mark.usefixtures("tools")
def test_no_emoji_without_a_system_line(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    import evaluate

    prompts = [pocket.PROMPT_TEMPLATE % row["prompt"] for row in pocket.emoji_questions()]
    replies = evaluate.complete(model, tokenizer, prompts)
    assert not any(is_emoji(char) for reply in replies for char in reply)
