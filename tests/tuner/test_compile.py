"""A compiled model computes, and trains, what the plain one does, as one graph."""

from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch

import pyreft
from architectures import ARCHITECTURES
from conftest import CACHE, pad, shaken, tiny_llama

MAKE = {one.name: one.make for one in ARCHITECTURES} | {"Llama": tiny_llama}


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def batch(prompts):
    ids, mask = pad(prompts, "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


@pytest.mark.parametrize(
    ("base", "rule", "place"),
    [
        ("Llama", "f1+l2", {"component": "block_output"}),
        ("Llama", "all", {"component": "block_input"}),
        ("Llama", "l2", {"intervention": "lora"}),
        ("GPT-NeoX", "l2", {"intervention": "lora"}),
        ("GPT-NeoX", "all", {"component": "value_output"}),
    ],
)
def test_one_graph_trains_the_same(prompts, base, rule, place):
    config = pyreft.ReftConfig(
        positions=rule, low_rank_dimension=4, share_weights=False, **{"intervention": "loreft"} | place
    )
    model = shaken(pyreft.get_reft_model(MAKE[base](), config))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(**batch(prompts))
        output.loss.backward()
        results.append([output.logits, *(parameter.grad.clone() for parameter in model.get_trainable_parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with model.disable_adapter():
        assert not torch.allclose(model(**batch(prompts)).logits, results[0][0])


def test_other_tokens_and_weights_need_no_other_graph(prompts):
    """Which tokens are edited, and with what, are inputs of the graph."""
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft")
        )
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch(prompts)
    for ends in (2, 3, 4):
        inputs["labels"][:, :ends] = -100
        with torch.no_grad():
            for parameter in model.get_trainable_parameters():
                parameter.add_(0.1)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "names", [["a", "b", "__base__", "b"], ["b", "b", "b", "b"], ["__base__", "a", "__base__", "c"]]
)
def test_rows_with_adapters_of_their_own(prompts, names):
    """Two rules that are stacked and one that is not, and rows without any."""
    rules = {"a": "l2", "b": "l2", "c": "all"}
    configs = {
        name: pyreft.ReftConfig(positions=rule, low_rank_dimension=4, intervention="loreft")
        for name, rule in rules.items()
    }
    model = pyreft.get_reft_model(tiny_llama(num_hidden_layers=2), configs["a"], adapter_name="a")
    model.add_adapter("b", configs["b"])
    model.add_adapter("c", configs["c"])
    shaken(model)
    inputs = {name: value for name, value in batch(prompts).items() if name != "labels"}
    compiled = torch.compile(model, backend="aot_eager")  # several adapters become one outside of graphs
    with torch.no_grad():
        for chosen in (names, names[::-1]):
            found = compiled(**inputs, adapter_names=chosen).logits
            torch.testing.assert_close(found, model(**inputs, adapter_names=chosen).logits, atol=1e-5, rtol=1e-4)


def test_one_graph_without_a_mask_and_with_a_cache():
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="f1+l2", low_rank_dimension=4, intervention="loreft")
        )
    )
    ids = torch.randint(3, 96, (2, 7))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = compiled(input_ids=ids), model(input_ids=ids)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
        # the cache knows which tokens were located, whoever goes on with it
        more = torch.randint(3, 96, (2, 1))
        steps = [model(input_ids=more, **{CACHE: output[CACHE]}).logits for output in (found, expected)]
    torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-4)


def test_a_compiled_model_in_threads(prompts):
    """Of a graph that breaks, what is left in Python finds the call of its thread, too."""
    base = tiny_llama(num_hidden_layers=2)
    model = shaken(
        pyreft.get_reft_model(base, pyreft.ReftConfig(positions="l2", low_rank_dimension=4, intervention="loreft"))
    )
    base.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    rows = [torch.tensor([row]) for row in prompts[:2]]
    with torch.no_grad():
        expected = [model(input_ids=row, use_cache=False).logits for row in rows]
        compiled(input_ids=rows[0], use_cache=False)

        def ask(number):
            with torch.no_grad():
                return compiled(input_ids=rows[number % 2], use_cache=False).logits

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(ask, range(12)))
    for number, logits in enumerate(found):
        torch.testing.assert_close(logits, expected[number % 2], atol=1e-5, rtol=1e-4)


def test_packed_rows_break_the_graph_and_are_right():
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="l1", low_rank_dimension=4, intervention="loreft")
        )
    )
    inputs = {"input_ids": torch.randint(3, 96, (1, 9)), "use_cache": False}
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits, atol=1e-5, rtol=1e-4)


class Logits(torch.nn.Module):
    """A model as those who write graphs down wrap it, with tensors for arguments and result."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("rule", ["l2", "f1+l2", "all"])
def test_what_is_exported_edits_each_prompt_at_its_own_tokens(prompts, rule):
    config = pyreft.ReftConfig(positions=rule, low_rank_dimension=4, intervention="loreft")
    model = shaken(pyreft.get_reft_model(tiny_llama(), config)).eval()
    ids, mask = pad(prompts, "left")
    tokens = torch.export.Dim("tokens", min=3, max=64)
    shapes = {"input_ids": {1: tokens}, "attention_mask": {1: tokens}, "use_cache": None}
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model.get_base_model(), (), given, dynamic_shapes=shapes, strict=False).module()
    for ids, mask in (pad(prompts[::-1], "right"), pad([prompt[:5] for prompt in prompts], "left")):
        found = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.*torch.jit.trace:DeprecationWarning",
    "ignore:.*torch.jit.trace:FutureWarning",  # from Python 3.14 on
)
@pytest.mark.parametrize("rule", ["l2", "f1+l2", "all"])
def test_what_is_traced_edits_each_prompt_at_its_own_tokens(prompts, rule):
    config = pyreft.ReftConfig(positions=rule, low_rank_dimension=4, intervention="loreft")
    model = shaken(pyreft.get_reft_model(tiny_llama(), config)).eval()
    traced = torch.jit.trace(Logits(model), pad(prompts, "left"), check_trace=False)
    for ids, mask in (pad(prompts[::-1], "right"), pad(prompts[:1], "right"), pad(prompts[1:], "left")):
        found = traced(ids, mask)
        torch.testing.assert_close(found, model(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("rule", ["l2", "f1+l1", "prompt"])
def test_a_formula_over_the_tokens_of_a_row_takes_the_located_ones(prompts, rule):
    """ReFT-r1's mean breaks the graph; the others that a compiled forward has beside them are not in it."""
    model = shaken(pyreft.get_reft_model(tiny_llama(), pyreft.ReftConfig(positions=rule, intervention="reftr1")))
    model.set_strength("default", 5)
    expected, plain = (call(**batch(prompts)).logits for call in (model, tiny_llama()))
    assert not torch.allclose(expected, plain, atol=0.1)
    torch.testing.assert_close(torch.compile(model, backend="eager")(**batch(prompts)).logits, expected)


@pytest.mark.parametrize("wrap", [pyreft.get_reft_model, peft.get_peft_model])
def test_a_file_fits_a_base_whether_it_is_compiled_or_not(prompts, tmp_path, wrap):
    """As wrapped before the adapter is put on, which puts `_orig_mod.` into the paths of all that is inside."""
    saved = shaken(wrap(torch.compile(tiny_llama(), backend="eager"), pyreft.ReftConfig(low_rank_dimension=2)))
    saved.eval().save_pretrained(tmp_path)
    plain, compiled = tiny_llama(), torch.compile(tiny_llama(), backend="eager")
    expected = saved.get_base_model()._orig_mod(**batch(prompts)).logits
    assert not torch.allclose(plain(**batch(prompts)).logits, expected)
    for base in (plain, compiled):
        pyreft.ReftModel.from_pretrained(base, tmp_path)
    for called in (plain, compiled._orig_mod):  # compiling is not what is tested
        torch.testing.assert_close(called(**batch(prompts)).logits, expected)


@pytest.mark.slow  # the C++ compiler
def test_with_the_default_compiler(prompts):
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="f1+l2", low_rank_dimension=4, intervention="loreft")
        )
    )
    output = torch.compile(model, fullgraph=True)(**batch(prompts))
    torch.testing.assert_close(output.logits, model(**batch(prompts)).logits, atol=1e-4, rtol=1e-4)


def test_one_step_of_decoding_is_the_base_models_graph():
    """With a static cache: prefill is edited, and what is compiled for decoding has no edit in it."""
    model = shaken(
        pyreft.get_reft_model(
            tiny_llama(), pyreft.ReftConfig(positions="f1+l2", low_rank_dimension=4, intervention="loreft")
        )
    )
    ids = torch.randint(3, 96, (2, 7))
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=ids, **greedy)
    base, graphs = model.get_base_model(), []

    def count(graph, example):
        graphs.append(str(graph.code))
        return graph

    forward, compiled = base.forward, torch.compile(base.forward, backend=count)
    base.forward = lambda *args, **kwargs: (compiled if kwargs["input_ids"].shape[1] == 1 else forward)(*args, **kwargs)
    tokens = model.generate(input_ids=ids, cache_implementation="static", disable_compile=True, **greedy)
    assert torch.equal(tokens, expected)
    assert graphs
    assert not any("linalg_qr" in code for code in graphs)
