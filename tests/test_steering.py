import pytest
import torch

import pyreft
from architectures import ARCHITECTURES
from pyreft import pocket

LAYER = 3


@pytest.fixture
def base():
    return pocket.load()


def prompts(wording=""):
    return [pocket.PROMPT_TEMPLATE % (pair["prompt"] + wording) for pair in pocket.emoji_questions()]


def test_the_vector_is_the_difference_of_the_means(base):
    model, tokenizer = base
    positive, negative = ["a whale swims", "oak"], ["the castle is old", "a rose", "no"]

    def mean(rows):
        states = []
        for row in rows:
            ids = tokenizer(row, return_tensors="pt")["input_ids"]
            assert ids[0, 0] == tokenizer.bos_token_id
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:])
        return torch.cat(states).mean(0)

    expected = mean(positive) - mean(negative)
    tokenizer.padding_side = "left"
    adapted = pyreft.diff_mean(model, tokenizer, positive, negative, LAYER, batch_size=2)
    (intervention,) = adapted.interventions.values()
    torch.testing.assert_close(intervention.bias.detach(), expected, atol=1e-4, rtol=1e-4)


def test_padding_moves_no_learned_position(base):
    model, tokenizer = next(one for one in ARCHITECTURES if one.name == "GPT-2").make(), base[1]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "left"
    texts = ["a whale swims in the sea", "oak"], ["the castle is old", "no"]
    vectors = []
    for batch_size in (1, 2):
        adapted = pyreft.diff_mean(model, tokenizer, *texts, 1, batch_size=batch_size)
        vectors += [intervention.bias.detach() for intervention in adapted.interventions.values()]
        adapted.unload()
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-4, rtol=1e-4)


def test_the_vector_of_values_that_alternate_with_queries_and_keys(base):
    model, tokenizer = next(one for one in ARCHITECTURES if one.name == "GPT-NeoX").make(), base[1]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    texts = ["a whale swims", "the castle is old"]
    means = []
    for text in texts:
        seen = []
        with model.gpt_neox.layers[1].attention.query_key_value.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        ):
            model(tokenizer(text, return_tensors="pt")["input_ids"])
        means.append(seen[0][0, 1:].view(-1, 4, 3, 8)[:, :, 2].flatten(1).mean(0))
    adapted = pyreft.diff_mean(model, tokenizer, texts[:1], texts[1:], 1, component="value_output")
    (intervention,) = adapted.interventions.values()
    torch.testing.assert_close(intervention.bias.detach(), means[0] - means[1], atol=1e-5, rtol=1e-4)


def test_it_is_an_adapter_like_any_other(base, tmp_path):
    model, tokenizer = base
    ids = tokenizer("What is a whale?", return_tensors="pt")["input_ids"]
    plain = model(ids).logits
    adapted = pyreft.diff_mean(model, tokenizer, prompts(), prompts(" Shout!"), LAYER)
    steered = adapted(ids).logits
    assert torch.equal(adapted(ids, strength=0).logits, plain)
    assert not torch.equal(adapted(ids, strength=-1).logits, steered)
    adapted.save(tmp_path)
    again = pyreft.ReftModel.load(tmp_path / "diff_mean", pocket.load()[0])
    assert torch.equal(again(ids).logits, steered)
    both = pyreft.diff_mean(again, tokenizer, ["yes"], ["no"], 2, adapter_name="other")
    assert both is again
    assert set(both.peft_config) == {"default", "other"}
    both.set_adapter("default")
    assert torch.equal(both(ids).logits, steered)


def test_it_steers_unseen_questions_without_training(base):
    model, tokenizer = base
    asked = prompts(" Answer in emojis.")
    adapted = pyreft.diff_mean(model, tokenizer, asked[:30], prompts()[:30], LAYER, pool="l1", positions="l1")
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts()[30:], padding=True, return_tensors="pt")

    def in_emojis(strength):
        tokens = adapted.generate(**batch, strength=strength, max_new_tokens=24, do_sample=False)
        answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(map(pocket.emojis_only, answers))

    assert in_emojis(0) == in_emojis(-2) == 0
    assert in_emojis(2) >= 12  # of 20; 17 when it was written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["a"], 1), "at least one positive and one negative"),
        (("a text", ["a"], 1), "expected lists of texts"),
        ((["a"], ["b"], 99), "layer: this model has the layers 0 to"),
    ],
)
def test_wrong_arguments(base, arguments, message):
    with pytest.raises(pyreft.ReftError, match=message):
        pyreft.diff_mean(*base, *arguments)
