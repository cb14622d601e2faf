"""What clients see: names in, names out, and nothing that a client says of adapters otherwise. No engine is needed."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import pytest

from pyreft.serving.vllm.flags import Settings
from pyreft.serving.vllm.front import LIMIT, Front
from served import engine, save_all


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("made"))


@pytest.fixture
def state(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "adapters")
    settings = Settings(adapters=str(root), rank=4, store=str(tmp_path / "store"))
    config = engine(settings)
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")])
    return SimpleNamespace(vllm_config=config, openai_serving_models=models, root=root)


CHAT = "/v1/chat/completions"


def ask(state, body, answer=b"{}", path=CHAT, kind=b"application/json", method="POST", more=()):
    """Send a body through the front; return what the app saw, what the client got, and its status."""
    seen, got = [], []
    parts = answer if isinstance(answer, list) else [answer]
    stream = isinstance(answer, list)

    async def app(scope, receive, send):
        message = await receive()
        length = dict(scope["headers"]).get(b"content-length")
        assert message["more_body"] or int(length) == len(message["body"])
        seen.append(message["body"])
        headers = [(b"content-type", b"text/event-stream" if stream else b"application/json")]
        if not stream:
            headers.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number + 1 < len(parts)})

    async def send(message):
        got.append(message)

    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    halves = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]

    async def receive():
        return {"type": "http.request", "body": halves.pop(0), "more_body": bool(halves)}

    headers = [(b"content-type", kind), (b"content-length", str(len(raw)).encode()), *more]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": SimpleNamespace(state=state)}
    asyncio.run(Front(app)(scope, receive, send))
    text = b"".join(message.get("body", b"") for message in got)
    start = got[0]
    length = dict(start["headers"]).get(b"content-length")
    assert length is None or int(length) == len(text)
    return (json.loads(seen[0]) if seen and seen[0][:1] == b"{" else seen), text, start["status"]


def test_a_name_becomes_the_base_with_the_adapters_digest(state):
    seen, text, _ = ask(state, {"model": "l4", "n": 2, "vllm_xargs": {"session_id": "s"}}, b'{"model":"base","x":1}')
    digest = state.reft_catalog.resolve("l4").digest
    assert seen == {"model": "base", "n": 2, "vllm_xargs": {"session_id": "s", "reft": digest}}
    assert json.loads(text) == {"model": "l4", "x": 1}
    seen, text, _ = ask(state, {"model": "base"}, b'{"model":"base"}')
    assert seen == {"model": "base"}
    assert json.loads(text) == {"model": "base"}


@pytest.mark.parametrize("model", ["l4", "base", "nobody"])
@pytest.mark.parametrize("holder", ["vllm_xargs", "extra_args", "sampling_params"])
def test_what_a_client_says_of_adapters_itself_has_no_effect(state, model, holder):
    own = {"reft": "a" * 64, "reft_strength": 7.0, "session_id": "s"}
    body = {"model": model, holder: {"extra_args": own} if holder == "sampling_params" else own}
    seen, _, _ = ask(state, body)
    assert "a" * 64 not in json.dumps(seen)
    assert "7.0" not in json.dumps(seen)
    assert '"session_id": "s"' in json.dumps(seen)
    # a JSON with the key twice is read once
    raw = json.dumps(body)[:-1].encode() + b', "vllm_xargs": {"reft": "' + b"b" * 64 + b'"}}'
    assert "b" * 64 not in json.dumps(ask(state, raw)[0])


def test_a_second_content_type_hides_nothing(state):
    """vLLM reads the first of them."""
    own = {"model": "base", "vllm_xargs": {"reft": "a" * 64}}
    for second in (b"text/plain", b"multipart/form-data"):
        assert ask(state, own, more=[(b"content-type", second)])[0] == {"model": "base", "vllm_xargs": {}}


@pytest.mark.parametrize("path", ["/generative_scoring", "/v1/systemone", "/v1/embeddings", "/inference/v1/generate"])
def test_where_no_adapter_is_heard_none_may_be_named(state, path):
    seen, text, status = ask(state, {"model": "l4"}, path=path)
    assert (seen, status) == ([], 400)
    assert json.loads(text)["error"]["message"] == f"{path} knows no adapters; ask the base model there."
    assert ask(state, {"model": "base"}, path=path)[0] == {"model": "base"}
    assert ask(state, {"model": "l4"}, path="/tokenize")[0]["model"] == "base"
    for answers in ("/invocations", "/v1/chat/completions/batch"):
        assert json.loads(ask(state, {"model": "l4"}, b'{"model":"base"}', path=answers)[1]) == {"model": "l4"}


def test_a_stream_is_renamed_event_by_event_wherever_it_is_cut(state):
    events = [{"model": "base", "choices": [{"delta": {"content": '"model":"base" é'}}]}]
    events += [{"type": "response.created", "response": {"model": "base"}}, {"choices": [], "model": "base"}]
    text = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + "data: [DONE]\n\n"
    raw = text.encode()
    for size in (1, 7, 50, len(raw)):
        parts = [raw[n : n + size] for n in range(0, len(raw), size)]
        _, got, _ = ask(state, {"model": "l4", "stream": True}, parts)
        lines = got.decode().split("\n")
        assert [line for line in lines if line][-1] == "data: [DONE]"
        found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [event.get("model") for event in found] == ["l4", None, "l4"]
        assert found[1]["response"]["model"] == "l4"
        assert found[0]["choices"] == events[0]["choices"]
        assert got.endswith(b"data: [DONE]\n\n")


def test_what_is_no_json_or_no_body_goes_on_as_it_is(state):
    assert ask(state, b"[bad", b"x")[:2] == ([b"[bad"], b"x")
    assert ask(state, b"model=l4", kind=b"multipart/form-data")[0] == [b"mode"]  # not even read
    assert ask(state, [1, 2])[0] == [b"[1, 2]"]
    assert ask(state, {"model": 7})[0] == {"model": 7}
    assert ask(state, {"model": "../adapters/l4"})[0] == {"model": "../adapters/l4"}


def test_a_refused_adapter_is_told_without_paths_and_the_others_go_on(state):
    (state.root / "l4" / "adapter_model.safetensors").write_bytes(b"")
    seen, text, status = ask(state, {"model": "l4"})
    assert (seen, status) == ([], 400)
    error = json.loads(text)["error"]
    assert "damaged" in error["message"]
    assert str(state.root) not in error["message"]
    assert ask(state, {"model": "l16"})[2] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "l4", "use_beam_search": True}, "beams cannot have an adapter"),
        ({"model": "l4", "reft_strength": "x"}, "reft_strength: expected a number, got 'x'"),
        ({"model": "l4", "reft_strength": True}, "reft_strength"),
        (b'{"model": "l4", "reft_strength": NaN}', "reft_strength"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_that_request(state, body, message):
    seen, text, status = ask(state, body)
    assert (seen, status) == ([], 400)
    assert message in json.loads(text)["error"]["message"]


def test_a_strength_goes_with_the_adapter(state):
    assert ask(state, {"model": "l4", "reft_strength": 1})[0]["vllm_xargs"]["reft_strength"] == 1.0
    assert "reft_strength" not in json.dumps(ask(state, {"model": "base", "reft_strength": 1})[0])


def test_a_body_without_end_is_refused(state):
    assert ask(state, b"[" * (LIMIT + 2))[2] == 413


def test_an_adapter_of_another_base_is_refused(state):
    path = state.root / "l4" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_shape"]["model_type"] = "qwen2"
    path.write_text(json.dumps(config))
    _, text, status = ask(state, {"model": "l4"})
    assert status == 400
    assert "another base model" in json.loads(text)["error"]["message"]
    state.vllm_config.additional_config["reft"]["rank"] = 3
    del state.reft_catalog
    _, text, status = ask(state, {"model": "l16"})
    assert "needs a rank of 4" in json.loads(text)["error"]["message"]
