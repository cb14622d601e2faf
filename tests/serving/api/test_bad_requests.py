"""Whatever comes in, an error of the API's form comes back, and the server goes on."""

import gzip
import json
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = {"model": "l4", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 1}
PLAIN = {"model": "l4", "prompt": "Why?", "max_tokens": 1}
ANSWER = {"model": "l4", "input": "Why?", "max_output_tokens": 1}
HEADERS = {"authorization": "Bearer secret", "content-type": "application/json"}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN, "/v1/responses": ANSWER}


def send(running, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(running.url + path, content=data, headers={**HEADERS, **headers}, timeout=60)


@pytest.mark.parametrize(
    ("path", "change", "status", "message"),
    [
        ("/v1/chat/completions", {"model": "l5"}, 404, "The model 'l5' does not exist. Did you mean 'l4'?"),
        ("/v1/chat/completions", {"model": 4}, 400, "model: Input should be a valid string."),
        ("/v1/chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role: "),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages: expected a text in the user's"),
        ("/v1/chat/completions", {"temperature": -1}, 400, "temperature: "),
        ("/v1/chat/completions", {"temperature": float("nan")}, 400, "temperature: Input should be a finite number."),
        ("/v1/chat/completions", {"top_p": 0}, 400, "top_p: "),
        ("/v1/chat/completions", {"n": 17}, 400, "n: expected at most 16 answers, got 17."),
        ("/v1/chat/completions", {"max_tokens": 10**9}, 400, "max_tokens: expected at most"),
        ("/v1/chat/completions", {"max_tokens": 0}, 400, "max_tokens: "),
        ("/v1/chat/completions", {"max_completion_tokens": 999}, 400, "max_completion_tokens: expected at most"),
        ("/v1/responses", {"max_output_tokens": 999}, 400, "max_output_tokens: expected at most"),
        ("/v1/chat/completions", {"stop": ["a"] * 17}, 400, "stop: List should have at most 16 items"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt.0: Input should be greater than or equal to 0."),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format.type: "),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            400,
            "response_format.type: ",
        ),
        ("/v1/chat/completions", {"guided_json": {}}, 400, "guided_json: this server does not support it"),
        ("/v1/chat/completions", {"vllm_xargs": {"reft": "0" * 64}}, 400, "vllm_xargs: this server does not support"),
        ("/v1/chat/completions", {"reft_strength": "much"}, 400, "reft_strength: "),
        ("/v1/chat/completions", {"stop": [""]}, 400, "stop: expected texts that are not empty."),
        ("/v1/chat/completions", {"stream_options": {}}, 400, "stream_options: only with stream=true."),
        ("/v1/chat/completions", {"logit_bias": {"99999": 1}}, 400, "logit_bias: expected tokens from 0 to 2047"),
        ("/v1/chat/completions", {"logit_bias": {"0" * 20 + "5000": 1}}, 400, "logit_bias: expected tokens from 0"),
        ("/v1/chat/completions", {"logit_bias": {"0" * 5000: 1}}, 400, "logit_bias: expected tokens from 0 to 2047"),
        ("/v1/chat/completions", {"repetition_penalty": 1e-45}, 400, "repetition_penalty: "),
        ("/v1/chat/completions", {"top_logprobs": 2}, 400, "top_logprobs: only with logprobs=true."),
        ("/v1/completions", {"prompt": []}, 400, "prompt: expected at least one token, got none."),
        ("/v1/completions", {"prompt": [99999]}, 400, "prompt: expected tokens from 0 to 2047."),
        ("/v1/completions", {"prompt": [[1], ["a"]]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "why " * 220}, 400, "The prompt has "),
        ("/v1/completions", {"prompt": "why " * 5000}, 400, "prompt: the prompt has "),
        ("/v1/completions", {"suffix": "a"}, 400, "suffix: "),
        ("/v1/completions", {"best_of": 3}, 400, "best_of: not supported, other than n."),
        ("/v1/completions", {"max_tokens": 0}, 400, "max_tokens: 0 only with echo=true."),
        ("/v1/responses", {"previous_response_id": "resp_1"}, 400, "previous_response_id: this server does not"),
        ("/v1/responses", {"store": True}, 400, "store: "),
        ("/v1/responses", {"input": [{"type": "function_call_output"}]}, 400, "input: an item of the type"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, 400, "tools.0.type: "),
    ],
)
def test_what_is_not_supported_is_refused_by_name(running, path, change, status, message):
    found = send(running, path, {**PATHS[path], **change})
    error = found.json()["error"]
    assert found.status_code == status, error
    assert error["message"].startswith(message)
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[1]", {}, 400),
        (b"null", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(), {}, 400),
        (json.dumps({**CHAT, "\ud800": 1}).encode(), {}, 400),
        (json.dumps({**CHAT, "model": "\ud800"}).encode(), {}, 404),
        (json.dumps(CHAT).encode(), {"content-type": "text/plain"}, 415),
        (gzip.compress(json.dumps(CHAT).encode(), mtime=0), {"content-encoding": "gzip"}, 415),
        (b" " * (2**20 + 1), {}, 413),
        (b"", {"content-length": str(2**40)}, 413),
        (json.dumps(CHAT).encode(), {"authorization": "Bearer sécret".encode("latin-1")}, 401),
        (json.dumps(CHAT).encode(), {"authorization": ""}, 401),
    ],
)
def test_bodies_that_are_none(running, body, headers, status):
    if "content-length" in headers:  # no client sends a wrong one
        lines = ["POST /v1/completions HTTP/1.1", "host: x", *(f"{k}: {v}" for k, v in {**HEADERS, **headers}.items())]
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])), timeout=10) as raw:
            raw.sendall("\r\n".join([*lines, "", ""]).encode())
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        return
    found = send(running, "/v1/chat/completions", body, **headers)
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"]


def test_what_may_be_null_is_as_if_it_were_not_said(running):
    for path, body in PATHS.items():
        assert send(running, path, {**body, "stream": None, "temperature": None}).status_code == 200
    streamed = send(running, "/v1/completions", {**PLAIN, "stream": True, "stream_options": {"include_usage": None}})
    assert '"usage"' not in streamed.text


def test_other_paths_and_methods(running):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        found = httpx.request(method, running.url + path, headers=HEADERS)
        assert (found.status_code, set(found.json())) == (status, {"error"})
    assert httpx.get(f"{running.url}/page/../listening.py", headers=HEADERS).status_code == 404
    assert httpx.get(f"{running.url}/page/%2e%2e/%2e%2e/errors.py", headers=HEADERS).status_code == 404
    for path in ("/docs", "/redoc"):  # which would load scripts from elsewhere
        assert httpx.get(running.url + path, headers=HEADERS).status_code == 404


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["l4", "user", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["n", "stop", "seed", "logit_bias", "messages", "prompt", "input", "tools", "top_k", "logprobs", "stream"]
FIELDS += ["reft_strength", "stream_options", "metadata", "top_p", "instructions", "text", "echo", "user", "model"]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(list(PATHS)), change=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_any_value_of_any_field_is_answered_or_refused(running, path, change):
    found = send(running, path, {**PATHS[path], **change})
    assert found.status_code in (200, 400, 404), (found.status_code, found.text)
    if found.status_code != 200:
        assert found.json()["error"]["message"]


def test_after_all_this_it_answers(running):
    assert running.idle()
    assert send(running, "/v1/chat/completions", CHAT).status_code == 200
    assert running.idle()  # the answer is sent before its slot is free
    assert not running.service.engine.edits.slots._users
