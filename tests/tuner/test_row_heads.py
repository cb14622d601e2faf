"""Trained heads of rows with adapters of their own: each row has the answer of its adapter alone."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import pyreft
from conftest import tiny_llama

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSES = {"pad_token_id": 0, "num_labels": 3}
BASES = {
    "one for each row": (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **CLASSES)), "SEQ_CLS", "score"),
    "for each token": (lambda: LlamaForTokenClassification(LlamaConfig(**SIZES, **CLASSES)), "TOKEN_CLS", "score"),
    "of several layers": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, **CLASSES)),
        "SEQ_CLS",
        "classifier",
    ),
    "a language model's": (tiny_llama, "CAUSAL_LM", "lm_head"),
    "what ids become": (tiny_llama, "CAUSAL_LM", "embed_tokens"),
}
IDS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(0))
NAMES = ["b", "a", "__base__", "without"]


def adapt(base):
    make, task, head = BASES[base]
    torch.manual_seed(0)

    def config(saved=head):
        return pyreft.ReftConfig(
            layers=[1], positions="l2", low_rank_dimension=3, task_type=task, modules_to_save=[saved]
        )

    adapted = peft.PeftModel(make(), config(), "a")  # of a kind that adds no heads itself
    adapted.add_adapter("b", config())
    bare = config()
    bare.modules_to_save = None
    adapted.add_adapter("without", bare)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "reft_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return adapted.eval()


def alone(adapted, ask):
    """What each row gives, asked with its adapter only."""
    found = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with adapted.disable_adapter():
                found.append(ask()[row])
        else:
            adapted.set_adapter(name)
            found.append(ask()[row])
    return torch.stack(found)


@pytest.mark.parametrize("base", BASES)
def test_each_row_has_the_head_of_its_adapter(base):
    adapted = adapt(base)
    with torch.no_grad():
        expected = alone(adapted, lambda: adapted(input_ids=IDS).logits)
        for active in ("a", "without"):
            adapted.set_adapter(active)
            its_own = adapted(input_ids=IDS).logits
            found = adapted(input_ids=IDS, adapter_names=NAMES).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(adapted(input_ids=IDS).logits, its_own)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_generated_with_the_head_of_its_adapter(beams):
    adapted = adapt("a language model's")
    greedy = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    expected = alone(adapted, lambda: adapted.generate(input_ids=IDS, **greedy))
    assert torch.equal(adapted.generate(input_ids=IDS, adapter_names=NAMES, **greedy), expected)


def test_calls_in_other_threads_have_heads_of_their_own():
    adapted = adapt("one for each row")
    with torch.no_grad():
        expected = alone(adapted, lambda: adapted(input_ids=IDS).logits)
        adapted.set_adapter("a")
        active, wrong = adapted(input_ids=IDS).logits, []

    def ask(by_row):
        with torch.no_grad():
            for _ in range(10):
                found = adapted(input_ids=IDS, **({"adapter_names": NAMES} if by_row else {})).logits
                if not torch.allclose(found, expected if by_row else active, atol=1e-4):
                    wrong.append(by_row)

    threads = [threading.Thread(target=ask, args=(by_row,)) for by_row in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_heads_are_switched_off_for_the_thread_that_asks_the_base_model(copied):
    """So it is in the middle of a call of another thread, and of a copy's."""
    make, task, head = BASES["one for each row"]
    torch.manual_seed(0)
    base = make().eval()
    config = pyreft.ReftConfig(layers=[1], positions="l2", low_rank_dimension=3, task_type=task)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        plain = base(input_ids=IDS).logits
        adapted = pyreft.get_reft_model(base, config, adapter_name="a").eval()
        for name, parameter in adapted.named_parameters():
            if "reft_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
        edited = adapted(input_ids=IDS).logits
        with adapted.disable_adapter():
            twin = copied(adapted)
            with twin.disable_adapter():
                asked = pool.submit(lambda: (twin(input_ids=IDS).logits, getattr(twin.get_base_model(), head).weight))
                found, weight = asked.result()
                assert torch.equal(twin(input_ids=IDS).logits, plain)
                assert torch.equal(twin(input_ids=IDS, adapter_names=["a"] * 4).logits, plain)
                its_own = getattr(twin.get_base_model(), head)
                assert torch.equal(its_own.weight, its_own.original_module.weight)
        torch.testing.assert_close(found, edited)
        assert torch.equal(weight, its_own.modules_to_save["a"].weight)
        assert all(torch.equal(model(input_ids=IDS).logits, edited) for model in (adapted, twin))
        with adapted.disable_adapter():
            adapted.base_model.enable_adapter_layers()
            assert torch.equal(adapted(input_ids=IDS).logits, plain)
        adapted.base_model.disable_adapter_layers()  # PEFT's switch is for all threads, as ever
        assert torch.equal(pool.submit(lambda: adapted(input_ids=IDS).logits).result(), plain)
        adapted.base_model.enable_adapter_layers()
        assert torch.equal(adapted(input_ids=IDS).logits, edited)


def test_a_part_that_fills_a_cache_cannot_be_of_single_rows():
    torch.manual_seed(0)
    chosen = {"layers": [1], "positions": "l2", "low_rank_dimension": 3}
    adapted = peft.get_peft_model(tiny_llama(), pyreft.ReftConfig(**chosen, modules_to_save=["layers.2"]), "a").eval()
    adapted.add_adapter("b", pyreft.ReftConfig(**chosen, modules_to_save=["layers.2"]))
    with pytest.raises(pyreft.ReftError, match=r"more than a tensor of rows.*Call the model once for each adapter"):
        adapted(input_ids=IDS[:2], adapter_names=["a", "b"])


def test_a_further_adapter_of_a_classifier_has_a_head_of_its_own():
    made = {"layers": [1], "positions": "l2", "task_type": "SEQ_CLS"}
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, **CLASSES))
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(**made), adapter_name="a")
    model.add_adapter("b", pyreft.ReftConfig(**made))
    assert [model.peft_config[name].modules_to_save for name in "ab"] == [["score"], ["score"]]
    model.set_adapter("b")
    assert model.get_base_model().score.modules_to_save["b"].weight.requires_grad
