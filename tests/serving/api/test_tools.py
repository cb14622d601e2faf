"""The calls in what a model answers."""

import pytest

pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")

from pyreft.errors import ReftError
from pyreft.serving.api.tools import check_shows_calls, take_calls

ANSWER = 'I ask. <tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b"}</tool_call>'


@pytest.mark.parametrize(("parallel", "names"), [(None, ["a", "b"]), (True, ["a", "b"]), (False, ["a"])])
def test_one_call_at_most_where_the_client_asks_for_it(parallel, names):
    text, calls = take_calls(ANSWER, parallel)
    assert text == "I ask."
    assert [call["function"]["name"] for call in calls] == names


def test_calls_of_which_the_template_makes_nothing_are_refused():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "rain"}}]}]
    check_shows_calls(turns, 'a <tool_call>{"name": "rain"}</tool_call>')
    quoted = [{"role": "assistant", "tool_calls": [{"function": {"name": 'of "rain"'}}]}]
    check_shows_calls(quoted, r'<tool_call>{"name": "of \"rain\""}</tool_call>')
    with pytest.raises(ReftError, match="messages: the model's chat template leaves out tool_calls, of 'rain'"):
        check_shows_calls(turns, "a")
