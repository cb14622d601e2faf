"""The server through its clients: the openai package, openai-agents, and bare HTTP."""

import http.client
import json
import socket
import time

import httpx
import pytest
import torch

import pyreft
from pyreft import pocket

openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")

SAY = [{"role": "user", "content": "What is a whale?"}]
GREEDY = {"max_tokens": 12, "temperature": 0}


def say(client, model, **more):
    return client.chat.completions.create(**{"model": model, "messages": SAY, **GREEDY, **more})


@pytest.fixture(scope="module")
def answer(running):
    """What `generate` answers with an adapter, none for the base."""
    model, tokenizer = pocket.load()
    prompt = tokenizer(pocket.PROMPT_TEMPLATE % SAY[0]["content"], return_tensors="pt")
    known = {}

    def find(name):
        if name not in known:
            if name is None:
                chosen = model
            else:
                chosen = pyreft.ReftModel.from_pretrained(pocket.load()[0], str(running.root / name)).eval()
            with torch.no_grad():
                tokens = chosen.generate(**prompt, max_new_tokens=12)
            known[name] = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return known[name]

    return find


def test_models_are_the_base_and_the_adapters(client):
    models = list(client.models.list())
    assert [model.id for model in models] == ["pocket", "all", "f3l3", "l16", "l4", "prompt"]
    assert client.models.retrieve("l4").parent == "pocket"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("l5")


def test_an_idle_connection_is_for_the_client_to_close(running):
    host, port = running.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.connect()
    for pause in (7, 0):  # httpx closes one after 5 s, and may send on it in the moment in which the server does
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.will_close) == (200, False)
        answer.read()
        time.sleep(pause)
    connection.close()


@pytest.mark.parametrize("name", ["pocket", "l4", "all"])
def test_every_door_answers_as_generate_does(client, answer, name):
    expected = answer(None if name == "pocket" else name)
    whole = say(client, name)
    assert (whole.model, whole.choices[0].message.content) == (name, expected)
    assert whole.choices[0].finish_reason in ("stop", "length")
    events = list(say(client, name, stream=True, stream_options={"include_usage": True}))
    assert {event.model for event in events} == {name}
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == expected
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    prompt = pocket.PROMPT_TEMPLATE % SAY[0]["content"]
    ids = pocket.load()[1](prompt)["input_ids"]
    assert whole.usage.prompt_tokens == len(ids)
    for given in (prompt, ids):
        assert client.completions.create(model=name, prompt=given, **GREEDY).choices[0].text == expected
    made = client.responses.create(model=name, input=SAY[0]["content"], max_output_tokens=12, temperature=0)
    assert (made.model, made.output_text) == (name, expected)
    with client.responses.stream(model=name, input=SAY, max_output_tokens=12, temperature=0) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == expected
    assert events[-1].type == f"response.{made.status}"
    assert made.usage == events[-1].response.usage


def test_what_a_request_does_not_say_is_as_generate_has_it(client, answer):
    made = client.chat.completions.create(model="l4", messages=SAY)
    assert made.choices[0].message.content.startswith(answer("l4"))
    assert made.choices[0].finish_reason == "stop"


def test_several_prompts_and_answers_are_numbered(client):
    prompts = [pocket.PROMPT_TEMPLATE % text for text in ("What is a whale?", "What is a cat?")]
    made = client.completions.create(model="all", prompt=prompts, n=2, max_tokens=6, temperature=1.2, seed=3)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in made.choices}) > 2
    again = client.completions.create(model="all", prompt=prompts[1], n=2, max_tokens=6, temperature=1.2, seed=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in made.choices[2:]]
    streamed = [""] * 4
    for event in client.completions.create(
        model="all", prompt=prompts, n=2, max_tokens=6, temperature=1.2, seed=3, stream=True
    ):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in made.choices]


def test_a_stop_is_not_in_the_answer(client, answer):
    stop = answer(None)[5:8]
    made = say(client, "pocket", stop=[stop, "never there"])
    assert made.choices[0].message.content == answer(None)[: answer(None).index(stop)]
    assert made.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client, answer):
    made = say(client, "pocket", logprobs=True, top_logprobs=3)
    told = made.choices[0].logprobs.content
    assert "".join(one.token for one in told).strip() == answer(None)
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in told)  # greedy: the likeliest
    streamed = [one.choices[0].logprobs for one in say(client, "pocket", logprobs=True, top_logprobs=3, stream=True)]
    assert [one.token for part in streamed if part for one in part.content] == [one.token for one in told]
    prompt = pocket.PROMPT_TEMPLATE % SAY[0]["content"]
    made = client.completions.create(model="pocket", prompt=prompt, max_tokens=1, echo=True, logprobs=1)
    told = made.choices[0].logprobs
    model, tokenizer = pocket.load()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        known = model(input_ids=ids).logits[0].log_softmax(-1)
    expected = known[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert told.token_logprobs[0] is None
    count = ids.shape[1]
    torch.testing.assert_close(torch.tensor(told.token_logprobs[1:count]), expected, atol=1e-4, rtol=1e-4)
    assert made.choices[0].text.startswith(tokenizer.decode(ids[0], skip_special_tokens=True))


def test_top_logprobs_have_the_chosen_token_and_offsets_are_those_of_the_text(client):
    prompt = pocket.PROMPT_TEMPLATE % SAY[0]["content"]
    asked = {"model": "pocket", "prompt": prompt, "max_tokens": 6, "temperature": 2, "seed": 1, "echo": True}
    made = client.completions.create(**asked, logprobs=2).choices[0]
    told = made.logprobs
    for token, logprob, top, at in zip(
        told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], told.text_offset[1:], strict=True
    ):
        assert top[token] >= logprob
        assert len(top) in (2, 3)
        assert token.startswith("<") or made.text[at:].startswith(token)  # which is not in the text
    assert "<|user|>" in told.tokens
    streamed = [event.choices[0].logprobs for event in client.completions.create(**asked, logprobs=2, stream=True)]
    assert [at for part in streamed if part for at in part.text_offset] == told.text_offset
    bare = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert [[*top] for top in bare.top_logprobs[1:]] == [[token] for token in told.tokens[1:]]


def test_strength_is_a_field_of_the_request(client, answer):
    assert say(client, "all", extra_body={"reft_strength": 0}).choices[0].message.content == answer(None)
    assert say(client, "all", extra_body={"reft_strength": 1.0}).choices[0].message.content == answer("all")


def test_located_tokens_are_those_that_are_edited(running):
    asked = {"model": "f3l3", "messages": SAY}
    found = httpx.post(
        f"{running.url}/v1/located_tokens", json=asked, headers={"authorization": "Bearer secret"}
    ).json()
    marks = [token["edited"] for token in found["tokens"]]
    assert marks == [True] * 3 + [False] * (len(marks) - 6) + [True] * 3
    assert not found["answer_edited"]


def post(running, path, data, key="secret", **more):
    return httpx.post(running.url + path, json=data, headers={"authorization": f"Bearer {key}"}, timeout=60, **more)


def test_a_key_is_for_its_models(running):
    def names(key):
        header = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{running.url}/v1/models", headers=header)

    assert [model["id"] for model in names("mine").json()["data"]] == ["pocket", "l4"]
    assert names("other").status_code == 401
    assert httpx.get(f"{running.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
    ask = {"messages": SAY, "max_tokens": 2}
    assert post(running, "/v1/chat/completions", {**ask, "model": "l4"}, "mine").status_code == 200
    refused = post(running, "/v1/chat/completions", {**ask, "model": "l16"}, "mine")
    assert refused.status_code == 404
    assert refused.json()["error"]["message"] == "The model 'l16' does not exist."  # nor is its name told
    for path, data in (("load", {"adapter_name": "a", "adapter_path": "/"}), ("unload", {"adapter_name": "l4"})):
        assert post(running, f"/v1/{path}_adapter", data, "mine").status_code == 403
    assert httpx.get(f"{running.url}/metrics", headers={"authorization": "Bearer mine"}).status_code == 403
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_adapters_come_and_go_while_it_runs(running, client, answer):
    from served import save

    save(running.root / "new", seed=2, positions="f3+l3")
    time.sleep(0.6)
    assert say(client, "new").choices[0].message.content == answer("f3l3")
    save(running.root / "new", seed=4, positions="all")  # other weights under the name
    time.sleep(0.6)
    assert say(client, "new").choices[0].message.content == answer("all")
    loaded = post(running, "/v1/load_adapter", {"adapter_name": "by-hand", "adapter_path": str(running.root / "l4")})
    assert loaded.status_code == 200, loaded.text
    assert say(client, "by-hand").choices[0].message.content == answer("l4")
    assert post(running, "/v1/unload_adapter", {"adapter_name": "by-hand"}).status_code == 200
    assert post(running, "/v1/unload_adapter", {"adapter_name": "new"}).status_code == 200
    for name in ("by-hand", "new", "../l4", "/etc", "l4/../l16", "l4\x00"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            say(client, name)


def test_a_client_that_goes_frees_its_place(running):
    """In the midst of a stream, and while it waits for a whole answer."""
    data = {"model": "all", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with httpx.stream(
        "POST",
        f"{running.url}/v1/completions",
        json={**data, "stream": True},
        headers={"authorization": "Bearer secret"},
    ) as stream:
        next(stream.iter_lines())
        assert running.scheduler.counts["running"] == 1
    assert running.idle(5)
    body = json.dumps(data).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "authorization: Bearer secret"]
    lines += [f"content-length: {len(body)}", "content-type: application/json", "", ""]
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall("\r\n".join(lines).encode() + body)
        end = time.monotonic() + 10
        while not running.scheduler.counts["running"] and time.monotonic() < end:
            time.sleep(0.01)
        assert running.scheduler.counts["running"] == 1
    assert running.idle(5)


def test_a_full_queue_says_when_to_come_again(running, monkeypatch):
    monkeypatch.setattr(running.scheduler, "queue", 0)
    found = post(running, "/v1/chat/completions", {"model": "f3l3", "messages": SAY})
    assert (found.status_code, found.headers.get("retry-after")) == (429, "1")
    assert found.json()["error"]["code"] == "queue_full"
    text = httpx.get(f"{running.url}/metrics", headers={"authorization": "Bearer secret"}).text
    assert 'pyreft_requests_total{model="f3l3",outcome="refused"} 1.0' in text
    assert 'model="f3l3"' not in text.replace('{model="f3l3",outcome="refused"}', "")  # no token was read


def test_a_late_answer_is_an_error(running, monkeypatch):
    from pyreft.serving.api.service import Limits

    monkeypatch.setattr(running.service, "limits", Limits(seconds=0.2))
    data = {"model": "pocket", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    found = post(running, "/v1/completions", data)
    assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
    streamed = post(running, "/v1/completions", {**data, "stream": True}).text
    assert "The time for this request is over." in streamed
    assert "[DONE]" not in streamed


def test_figures_for_prometheus(running, client):
    say(client, "l16")
    text = httpx.get(f"{running.url}/metrics", headers={"authorization": "Bearer secret"}).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found['pyreft_requests_total{model="l16",outcome="done"}']) >= 1
    assert float(found['pyreft_answer_tokens_total{model="l16"}']) >= 1
    assert float(found['pyreft_first_token_seconds_count{model="l16"}']) >= 1
    assert found["pyreft_answers_running"] == "0.0"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_model_that_cannot_call_tools_says_so(client):
    with pytest.raises(openai.BadRequestError, match="tools: the model cannot call tools"):
        say(client, "pocket", tools=[WEATHER])
