"""The calls in what a model answers."""

import pytest

pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")

from pyreft.serving.api.tools import take_calls

ANSWER = 'I ask. <tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b"}</tool_call>'


@pytest.mark.parametrize(("parallel", "names"), [(None, ["a", "b"]), (True, ["a", "b"]), (False, ["a"])])
def test_one_call_at_most_where_the_client_asks_for_it(parallel, names):
    text, calls = take_calls(ANSWER, parallel)
    assert text == "I ask."
    assert [call["function"]["name"] for call in calls] == names
