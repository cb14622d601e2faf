"""Every way of transformers to generate gives, for an adapted model, what plain `generate` gives."""

import threading
import warnings

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

import pyreft
from architectures import ARCHITECTURES
from conftest import shaken, tiny_llama
from pyreft import pocket

GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUESTIONS = [pocket.PROMPT_TEMPLATE % text for text in ("What is a whale?", "Where can I see an oak in the woods?")]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = pocket.load()[1]
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(params=["f1+l2", "all"])
def adapted(request):
    torch.manual_seed(0)
    config = pyreft.ReftConfig(positions=request.param, low_rank_dimension=2, layers=[1, 3], intervention="loreft")
    return shaken(pyreft.get_reft_model(pocket.load()[0], config))


@pytest.fixture
def batch(tokenizer):
    return tokenizer(QUESTIONS, padding=True, return_tensors="pt")


def test_a_generation_with_dropout_is_told(batch):
    model = shaken(pyreft.get_reft_model(pocket.load()[0], pyreft.ReftConfig()))
    with pytest.warns(UserWarning, match=r"dropout falls on the answers. Call model.eval\(\) before it, .* dropout=0"):
        model.train().generate(**batch, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            model.generate(**batch, **GREEDY)
        assert torch.equal(*(model.eval().generate(**batch, **GREEDY) for _ in range(2)))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches(adapted, batch, cache):
    plain = adapted.generate(**batch, **GREEDY)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(**batch, **GREEDY), plain)
    options = {"disable_compile": True} if cache == "static" else {}
    assert torch.equal(adapted.generate(**batch, **GREEDY, cache_implementation=cache, **options), plain)


@pytest.mark.parametrize("assistant", ["the base", "a small model", "the prompt"])
def test_assisted_decoding(adapted, tokenizer, assistant):
    batch = tokenizer(QUESTIONS[0], return_tensors="pt")
    plain = adapted.generate(**batch, **GREEDY)
    small = {"vocab_size": adapted.config.vocab_size, "num_hidden_layers": 1, "bos_token_id": 2, "eos_token_id": 3}
    options = {
        "the base": lambda: {"assistant_model": pocket.load()[0]},
        "a small model": lambda: {"assistant_model": tiny_llama(**small)},
        "the prompt": lambda: {"prompt_lookup_num_tokens": 2},
    }
    assert torch.equal(adapted.generate(**batch, **GREEDY, **options[assistant]()), plain)


def test_streaming(adapted, tokenizer, capsys):
    batch = tokenizer(QUESTIONS[0], return_tensors="pt")
    plain = adapted.generate(**batch, **GREEDY)[0, batch["input_ids"].shape[1] :]
    text = tokenizer.decode(plain, skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=adapted.generate, kwargs={**batch, **GREEDY, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    adapted.generate(**batch, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipelines(adapted, tokenizer, batch, batch_size):
    plain = adapted.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(plain, skip_special_tokens=True)
    generator = pipeline("text-generation", model=adapted, tokenizer=tokenizer)
    found = generator(QUESTIONS, **GREEDY, batch_size=batch_size, return_full_text=False)
    assert [row[0]["generated_text"] for row in found] == texts


@pytest.mark.parametrize("form", ["rows", "rows of three axes", "one row for all", "none"])
def test_positions_that_are_given_go_with_their_tokens(form):
    """As Qwen2-VL's, of three axes; GPT-2's are absolute, so that a wrong one is seen."""
    kinds = {"rows of three axes": "Qwen2-VL"}
    base = next(one for one in ARCHITECTURES if one.name == kinds.get(form, "GPT-2")).make().eval()
    adapted = shaken(
        pyreft.get_reft_model(base, pyreft.ReftConfig(positions="f1+l2", layers=[0], intervention="loreft"))
    )
    rows = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
    options = {**GREEDY, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    alone = [adapted.generate(torch.tensor([row]), **options)[0, len(row) :] for row in rows]
    ids = torch.tensor([rows[0], [*rows[1], 0, 0, 0]])
    mask = (ids != 0).long()
    positions = {
        "rows": (mask.cumsum(-1) - 1).clamp(min=0),
        "rows of three axes": (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1),
        "one row for all": torch.arange(6)[None],
    }
    given = {"position_ids": positions[form]} if form in positions else {}
    found = adapted.generate(ids, attention_mask=mask, **given, **options)[:, 6:]
    assert torch.equal(found, torch.stack(alone))
