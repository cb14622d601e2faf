"""`forward` of an adapted model, called past the hooks of `__call__`, is edited as its front door is."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoModelForSeq2SeqLM, BertConfig, LogitsProcessor, T5Config

import pyreft
from architectures import ARCHITECTURES
from conftest import shaken, tiny_llama
from pyreft.tuner.call import running

LENGTHS = torch.tensor([4, 6])


def config(positions="l2"):
    return pyreft.ReftConfig(layers=[1, 3], positions=positions, low_rank_dimension=2, intervention="loreft")


def tiny_bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return AutoModel.from_config(BertConfig(vocab_size=96, **sizes)).eval()


def tiny_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
    return AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)).eval()


@pytest.fixture
def model():
    """A model with two adapters of its own, the first one active."""
    model = tiny_llama()
    model.add_adapter(config("f1"), "second")
    model.add_adapter(config(), "first")
    return shaken(model)


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 9))


def clean(model):
    """What the model's modules have in the place of their classes' methods."""
    return {name for module in model.modules() for name in vars(module) if callable(getattr(type(module), name, None))}


@torch.no_grad()
def answers(forward, ids, **given):
    return forward(input_ids=ids, **given)[0]


@pytest.mark.parametrize(
    ("base", "at"),
    [(tiny_llama, ""), (tiny_llama, "model"), (tiny_bert, ""), (tiny_t5, "encoder"), (tiny_t5, "")],
    ids=["language model", "backbone", "bert", "encoder", "both stacks"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_edited_as_the_front_door(base, at, wrapped, ids):
    model = base()
    module = model.get_submodule(at)
    given = {"decoder_input_ids": ids} if base is tiny_t5 and not at else {}
    plain = answers(module, ids, **given)
    adapted = pyreft.get_reft_model(model, config()) if wrapped else model
    if not wrapped:
        model.add_adapter(config())
    shaken(adapted)
    expected = answers(module, ids, **given)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert torch.equal(answers(module.forward, ids, **given), expected)
    assert not running.frames


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Gemma 3 with images"])
def test_the_language_model_inside_is_called_for_a_text(name):
    """As LoRA acts there: what the whole computes of the same text."""
    base = next(one for one in ARCHITECTURES if one.name == name).make().eval()
    inside, ids = base.get_decoder(), torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    given = {"attention_mask": (ids != 0).long()}
    plain = answers(inside, ids, **given)
    adapted = shaken(
        pyreft.get_reft_model(base, pyreft.ReftConfig(layers=[1], positions="f1+l2", intervention="loreft"))
    )
    expected = answers(adapted.get_base_model().model, ids, **given)
    for forward in (inside, inside.forward):
        assert torch.equal(answers(forward, ids, **given), expected)
    assert not torch.allclose(expected[1], plain[1], atol=1e-3)
    adapted.unload()
    assert torch.equal(answers(inside, ids, **given), plain)
    assert not clean(base)


def test_what_a_call_gives_counts(model, ids):
    for given in ({"prompt_lengths": LENGTHS}, {"strength": 0.5}, {"labels": ids}):
        assert torch.equal(answers(model.forward, ids, **given), answers(model, ids, **given))
    with torch.no_grad():
        assert torch.equal(model.forward(ids).logits, model(ids).logits)
    with pytest.raises(pyreft.ReftError, match="expected a finite number"):
        model.forward(ids, strength="a lot")
    assert not running.frames


def test_the_adapter_that_is_active_acts(model, ids):
    first = answers(model.forward, ids)
    model.set_adapter("second")
    assert torch.equal(answers(model.forward, ids), answers(model, ids))
    assert not torch.allclose(answers(model.forward, ids), first, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(answers(model.forward, ids), answers(tiny_llama(), ids))
    model.enable_adapters()
    model.delete_adapter(["first", "second"])
    assert torch.equal(answers(model.forward, ids), answers(tiny_llama(), ids))


def test_it_takes_what_the_class_takes(model):
    assert inspect.signature(model.forward) == inspect.signature(tiny_llama().forward)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_that_of_a_copy_computes_with_the_copy(model, ids, copied):
    expected = answers(model, ids)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(answers(twin.forward, ids), expected)


def test_that_of_a_replica_computes_with_the_replica(model, ids):
    """As where a library that calls `forward` runs in `DataParallel`."""
    expected = answers(model, ids)
    replica = model._replicate_for_data_parallel()
    replica.lm_head = torch.nn.Linear(32, 5, bias=False)
    assert answers(replica.forward, ids).shape == answers(replica, ids).shape == (2, 9, 5)
    assert torch.equal(answers(model.forward, ids), expected)


def test_that_of_a_shallow_copy_computes_with_it_at_its_front_door(model, ids):
    other = copy.copy(model)
    other._modules = dict(model._modules, lm_head=torch.nn.Linear(32, 5, bias=False))
    assert answers(other, ids).shape == (2, 9, 5)


@pytest.mark.parametrize("own", [False, True])
def test_the_base_model_is_as_it_was_when_the_edits_are_gone(own, ids):
    base = tiny_llama()
    if own:  # as accelerate puts there
        base.forward = former = lambda *args, **kwargs: type(base).forward(base, *args, **kwargs)
    before, plain = clean(base), answers(base, ids)
    adapted = shaken(pyreft.get_reft_model(base, config()))
    assert torch.equal(answers(base.forward, ids), answers(base, ids))
    kept = base.forward  # by whoever took it while there were edits
    adapted.unload()
    assert clean(base) == before
    assert not own or base.forward is former
    assert torch.equal(answers(base.forward, ids), plain)
    assert torch.equal(answers(kept, ids), plain)


def test_one_graph(model, ids):
    expected = answers(model, ids, use_cache=False)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answers(compiled, ids, use_cache=False), expected)


def test_in_threads(model, ids):
    expected = [answers(model, row) for row in ids.split(1)]
    found = [None, None]

    def run(number):
        for _ in range(10):
            found[number] = answers(model.forward, ids[number : number + 1])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


def test_gradients_under_gradient_checkpointing(model, ids):
    model.train()
    gradients = []
    for forward, checkpointed in ((model, False), (model.forward, False), (model.forward, True)):
        if checkpointed:
            new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.2x
            enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if p.grad is not None])
    assert gradients[0]
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, one)


def test_inside_a_generation_it_is_a_call_of_its_own(model, ids):
    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(answers(model.forward, ids))
            return scores

    seen, greedy = [], {"max_new_tokens": 4, "do_sample": False}
    expected, tokens = answers(model, ids), model.generate(input_ids=ids, **greedy)
    assert torch.equal(model.generate(input_ids=ids, **greedy, logits_processor=[Asks()]), tokens)
    assert len(seen) == 4
    assert all(torch.equal(one, expected) for one in seen)


def test_another_forward_in_its_place(model, ids):
    expected = answers(model, ids)
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)  # as Liger's kernels do it
    assert torch.equal(answers(model, ids), expected)
    assert torch.equal(answers(model.forward, ids), expected)  # the backbone is entered at its front door
    assert not running.frames


def test_accelerate_wraps_and_unwraps_it(model, ids):
    AcceleratorState._reset_state(True)  # of a test before, with another precision
    expected = answers(model, ids)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    half = answers(prepared, ids)
    assert not torch.equal(half, expected)
    assert torch.equal(answers(prepared.forward, ids), half)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(answers(plain, ids), expected)
    assert torch.equal(answers(plain.forward, ids), expected)
    AcceleratorState._reset_state(True)


def test_a_library_that_calls_it(tmp_path):
    """sentence-transformers: an adapter that is added, saved and loaded again encodes what the front door gives."""
    sentences = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "whales", "oaks", "are", "tall", "and", "old"]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    tiny_bert().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    encoder = sentences.SentenceTransformer(str(tmp_path / "base"), device="cpu")  # with the mean of all tokens
    texts = ["whales are old and tall", "oaks"]
    before = torch.from_numpy(encoder.encode(texts))
    encoder.add_adapter(config("f1+l1"))
    shaken(encoder)
    encoded = torch.from_numpy(encoder.encode(texts))
    assert not torch.allclose(encoded, before, atol=1e-3)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    states = answers(encoder.transformers_model, batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close((states * mask).sum(1) / mask.sum(1), encoded)
    encoder.save(str(tmp_path / "saved"))
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(torch.from_numpy(again.encode(texts)), encoded)


def test_an_interrupted_call_leaves_nothing_for_the_next(monkeypatch):
    adapted = shaken(pyreft.get_reft_model(tiny_llama(), config()))
    base = adapted.base_model.model
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "labels": torch.where(torch.arange(8) < 5, -100, ids)}
    right = adapted(**given).logits

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyreft.tuner.hooks.resolve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapted(input_ids=ids)
    monkeypatch.undo()
    assert not running.announced
    assert torch.equal(base.forward(**given).logits, right)
