"""Where a prompt ends in tokens: as `generate` sees it, whatever the answer begins with."""

import json
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import pyreft
from pyreft import make_multiple_position_supervised_data_module, pocket
from pyreft.data.boundary import pair_ids, token_ids
from pyreft.data.encode import chat_text, encode
from pyreft.data.files import Example
from pyreft.data.spans import make_span_supervised_data_module
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.settings import TrainingJob

CASES = [("Question: Is the sky blue? Answer: ", "yes"), ("Is it? ", "no"), ("a", "b"), ("x\n", "\ny"), ("Hi:", " yes")]


def spaced():
    """A tokenizer that puts a space before a text, as Llama's does: a word alone is one behind a space."""
    pieces = ["<unk>", "</s>", "▁", "▁yes", "yes", "▁no", "no", "▁Answer", ":", "s", "y", "e", "▁a", "a", "b", "▁b"]
    inner = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(("prompt", "answer"), CASES)
def test_the_prompt_is_what_generate_sees_and_the_labels_spell_the_answer(prompt, answer):
    tokenizer = pocket.load()[1]
    before, learned = pair_ids(tokenizer, prompt, answer)
    assert before == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(learned) == answer


@pytest.mark.parametrize(("prompt", "answer"), [("Answer: ", "yes"), ("Answer:", " yes"), ("a ", "b"), ("a", "b")])
def test_no_space_is_put_before_an_answer(prompt, answer):
    tokenizer = spaced()
    before, learned = pair_ids(tokenizer, prompt, answer)
    assert before == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(before + learned) == prompt + answer


def test_every_data_module(tmp_path):
    tokenizer = pocket.load()[1]
    prompt, answer = CASES[0]
    seen = tokenizer(prompt)["input_ids"]
    spans = make_span_supervised_data_module(tokenizer, None, [prompt.replace("sky", "[[sky]]")], [answer])
    rows = [
        pyreft.make_last_position_supervised_data_module(tokenizer, None, [prompt], [answer])["train_dataset"][0],
        make_multiple_position_supervised_data_module(tokenizer, None, [prompt], [answer], "l1")["train_dataset"][0],
        spans["train_dataset"][0],
        pyreft.ReftRawDataset(
            "a", None, tokenizer, dataset=[{"instruction": prompt, "output": answer}], position="l1",
            num_interventions=1, pad_mode="none",
        )[0],
        pyreft.ReftGenerationDataset(
            "a", None, tokenizer, dataset=[{"prompt": prompt, "completion": answer}], position="l1",
            num_interventions=1, pad_mode="none",
        )[0],
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": answer}))
    rows += PreparedJob(TrainingJob(data=str(path), format="text", layers="2", reach=False)).rows
    for row in rows:
        ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
        assert ids[: labels.count(-100)] == seen
        assert tokenizer.decode(labels[labels.count(-100) :]) == f"{answer}{tokenizer.eos_token}"


def test_an_eos_token_behind_the_prompt_is_told():
    """By a tokenizer that ends every text; the tokens are those that `generate` would see."""
    tokenizer = pocket.load()[1]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = made
    with pytest.warns(UserWarning, match="puts '</s>' behind every text, so it stands between each prompt and its"):
        before, answer = pair_ids(tokenizer, "Say:", " yes")
    assert before == tokenizer("Say:")["input_ids"]
    assert tokenizer.decode(answer) == " yes"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair_ids(tokenizer, "<s>Say:", " yes")  # as a chat template writes it


@pytest.mark.parametrize("prompt", ["", "a </s> "])
def test_an_eos_token_that_begins_a_text_or_stands_in_it_is_not_told(prompt):
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="</s>", eos_token="</s>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pair_ids(tokenizer, prompt, "a")[0][-1] == 1


def test_an_unknown_letter_behind_an_unknown_one_belongs_to_the_answer():
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("a", -1.0), ("es", -1.0), ("no", -1.0)]
    model = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    assert tokenizer("a\nYes")["input_ids"] == [2, 3, 0, 4], "one token for both"
    assert pair_ids(tokenizer, "a\n", "Yes") == ([2, 3, 0], [2, 0, 4])
    assert pair_ids(tokenizer, "a\n", "no") == ([2, 3, 0], [5])
    assert pair_ids(tokenizer, "a\n", "noX") == ([2, 3, 0], [5, 0])  # only a later letter is unknown


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_a_chat_has_the_special_tokens_of_its_template_alone(bos):
    """As of `apply_chat_template`, trainers of TRL and servers, whatever the tokenizer adds to texts."""
    tokenizer = pocket.load()[1]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = made
    tokenizer.chat_template = (
        bos + "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "C"}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert token_ids(tokenizer, chat_text(tokenizer, turns[:1])) == asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = encode(tokenizer, Example("row 1", "chat", tuple(turns)), "chat", 512)
    assert row["labels"].count(-100) == len(asked)
    assert row["input_ids"][: len(asked)] == asked
