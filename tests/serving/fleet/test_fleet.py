"""Two real replicas on this machine, behind Ray's proxy: pytest -m slow tests/serving/fleet (minutes).

The API listens on 127.0.0.1; everything is stopped at the end.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from fleets import (
    PROMPT,
    SAY,
    SECRET,
    answers,
    figures,
    homes_of_new,
    post,
    replicas,
    settled,
    start,
    started_cluster,
    total,
    until,
    which,
)
from running import healthy
from served import RULES, save, save_all
from snippets import blocks

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'pyreft[ray]'")
serve = pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

LONG = {"prompt": "a", "max_tokens": 240, "ignore_eos": True}
PREFIXES = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
RAYS = (  # as docs/fleet.md has them
    "ray_serve_num_ongoing_http_requests",
    "ray_serve_deployment_queued_queries",
    "ray_serve_num_http_error_requests_total",
    "ray_serve_deployment_replica_healthy",
)
SMALL = {"slots": 8, "cache": 0.5, "max_body": 0.1, "timeout": 120, "api_key": "secret mine=pocket,l4"}


@pytest.fixture(scope="module")
def cluster():
    with started_cluster() as url:
        yield url


@contextmanager
def running(*args):
    """Run a fleet until the end of the block."""
    start(*args, **SMALL)
    try:
        yield
    finally:
        serve.delete("pyreft")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def fleet(cluster, root, tmp_path_factory):
    start(root, tmp_path_factory.mktemp("store"), rows=4, queue=4, **SMALL)
    return cluster


@pytest.fixture(scope="module")
def answer(root):
    return answers(root)


def test_answers_are_those_of_generate(fleet, answer):
    """Of the base and every adapter, at every door, whole and streamed, all at once."""
    client = openai.OpenAI(base_url=f"{fleet}/v1", api_key="secret", timeout=120, max_retries=20)
    assert [model.id for model in client.models.list()] == ["pocket", *sorted(RULES)]

    def ask(name):
        expected = answer(None if name == "pocket" else name)
        made = client.chat.completions.create(model=name, messages=SAY, max_tokens=12, temperature=0)
        events = client.chat.completions.create(model=name, messages=SAY, max_tokens=12, temperature=0, stream=True)
        streamed = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        text = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
        said = client.responses.create(model=name, input=SAY[0]["content"], max_output_tokens=12, temperature=0)
        assert (made.model, said.model) == (name, name)
        assert [made.choices[0].message.content, streamed, text, said.output_text] == [expected] * 4

    names = ["pocket", *RULES] * 2
    for name in RULES:
        answer(name)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, names))
    assert "<html" in httpx.get(fleet, timeout=60).text


def test_an_adapter_is_asked_where_it_is(fleet, root):
    homes = homes_of_new(fleet, root, 3)
    assert set(homes.values()) == set(replicas())  # those that hold fewest got the new ones
    for name, home in homes.items():
        assert {which(fleet, name, "another question") for _ in range(5)} == {home}
    assert len({which(fleet, "pocket") for _ in range(40)}) == 2  # the base model is everywhere


def test_what_the_server_refuses_is_refused(fleet):
    ask = {"model": "l4", "prompt": "a", "max_tokens": 1}
    for name in ("l5", "../l4", "/etc", "l4/../l16", "l4\x00", "", "l" * 3000):
        found = post(fleet, {**ask, "model": name})
        assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")
    assert post(fleet, ask, key="other").status_code == 401
    assert post(fleet, {**ask, "model": "l16"}, key="mine").status_code == 404
    assert post(fleet, ask, key="mine").status_code == 200
    assert post(fleet, {**ask, "prompt": "a" * 200_000}).status_code == 413
    assert post(fleet, {**ask, "bad": 1}).json()["error"]["code"] == "unsupported_parameter"
    assert post(fleet, {**ask, "prompt": [-1]}).status_code == 400
    found = httpx.post(f"{fleet}/v1/completions", content=b"{", headers={**SECRET, "content-type": "application/json"})
    assert found.json()["error"]["message"] == "The body is no valid JSON."
    assert httpx.post(f"{fleet}/v1/completions", content=b"{}", headers=SECRET).status_code == 415
    for path in ("load_adapter", "unload_adapter", "nothing"):
        found = post(fleet, {}, f"/v1/{path}")
        assert found.status_code == 404
        assert ("share a directory or URL" in found.json()["error"]["message"]) is (path != "nothing")


def test_a_replaced_adapter_is_seen(fleet, root, answer):
    save(root / "new", seed=2, positions="f3+l3")
    ask = {"model": "new", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    until(lambda: post(fleet, ask).status_code == 200)
    assert post(fleet, ask).json()["choices"][0]["text"] == answer("f3l3")
    save(root / "new", seed=4, positions="all")
    until(lambda: post(fleet, ask).json()["choices"][0]["text"] == answer("all"))
    time.sleep(1)
    assert {post(fleet, ask).json()["choices"][0]["text"] for _ in range(10)} == {answer("all")}


def test_more_than_wait_are_told_when_to_come_again(fleet):
    """Of thirty at once: four rows on each of two replicas, and four that wait at the gate."""
    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda _: post(fleet, {**LONG, "model": "pocket"}), range(30)))
    assert {one.status_code for one in found} == {200, 429}
    for one in found:
        if one.status_code == 429:
            assert (one.json()["error"]["code"], one.headers["retry-after"]) == ("queue_full", "1")
        else:
            assert one.json()["usage"]["completion_tokens"] == LONG["max_tokens"]


def test_clients_that_go_free_their_places(fleet):
    cancelled = {"model": "f3l3", "outcome": "cancelled"}
    before, data = total(fleet, "pyreft_requests_total", **cancelled), {**LONG, "model": "f3l3", "stream": True}
    streams = [httpx.stream("POST", f"{fleet}/v1/completions", json=data, headers=SECRET) for _ in range(3)]
    for stream in streams:
        found = stream.__enter__()
        assert found.status_code == 200
        next(found.iter_lines())
        stream.__exit__(None, None, None)
    until(lambda: total(fleet, "pyreft_requests_total", **cancelled) == before + len(streams), 20)
    until(lambda: total(fleet, "pyreft_answers_running") == 0, 20)


def test_figures_are_those_of_all_replicas(fleet):
    """Each with the replica that it is of; their sum is what was asked, wherever it was answered."""
    assert httpx.get(f"{fleet}/metrics").status_code == 401
    assert httpx.get(f"{fleet}/metrics", headers={"authorization": "Bearer mine"}).status_code == 403
    before = total(fleet, "pyreft_requests_total", model="pocket", outcome="done")
    homes = [which(fleet, "pocket") for _ in range(30)]
    assert len(set(homes)) == 2
    until(lambda: total(fleet, "pyreft_requests_total", model="pocket", outcome="done") == before + 30)
    found = figures(fleet)
    assert found["pyreft_replicas"] == 2
    for home in set(homes):
        labels = f'{{model="pocket",outcome="done",replica="{home}"}}'
        assert found[f"pyreft_requests_total{labels}"] >= homes.count(home)
        assert found[f'pyreft_first_token_seconds_count{{model="pocket",replica="{home}"}}'] >= homes.count(home)
        assert found[f'pyreft_answers_running{{replica="{home}"}}'] == 0


def test_ray_tells_of_requests_that_no_replica_has_seen(fleet):
    """What docs/fleet.md names of Ray's own figures is at Ray's own address."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until(lambda: all(name in httpx.get(url, timeout=60).text for name in RAYS), 30)


def test_a_killed_replica_takes_no_whole_answer_with_it(fleet):
    """Every client has an error or the whole answer; new requests are answered meanwhile, and a replica comes back."""
    expected = post(fleet, {**LONG, "model": "l4", "temperature": 0}).json()["choices"][0]["text"]
    home = which(fleet, "l4")
    begun = threading.Event()
    outcomes = []

    def ask(number):
        data = {**LONG, "model": "l4", "stream": number % 2 == 0, "temperature": 0}
        text, ended = "", False
        try:
            with httpx.stream("POST", f"{fleet}/v1/completions", json=data, headers=SECRET, timeout=120) as found:
                if found.status_code != 200:
                    return outcomes.append(("refused", found.status_code))
                for line in found.iter_lines():
                    begun.set()
                    if not data["stream"]:
                        return outcomes.append(("whole", json.loads(line)["choices"][0]["text"] == expected))
                    event = line.removeprefix("data: ")
                    if event == "[DONE]":
                        ended = True
                    elif event:
                        told = json.loads(event)
                        if "error" in told:
                            return outcomes.append(("error", told["error"]["code"]))
                        text += told["choices"][0]["text"]
        except httpx.HTTPError as error:
            return outcomes.append(("cut", type(error).__name__))
        outcomes.append(("whole", text == expected) if ended else ("cut", "without an end"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    ray.kill(replicas()[home])
    ask_one = {"model": "l16", "prompt": "a", "max_tokens": 1}
    until(lambda: post(fleet, ask_one).status_code == 200, 20)
    assert home not in {which(fleet, name) for name in ("l16", "pocket", "l4") for _ in range(3)}
    for thread in threads:
        thread.join(120)
    assert len(outcomes) == 8
    assert ("whole", False) not in outcomes
    assert [outcome for outcome in outcomes if outcome[0] != "whole"], outcomes  # or nothing was tried
    until(lambda: len(replicas().keys() - {home}) == 2, 120)
    until(lambda: len({which(fleet, "pocket") for _ in range(10)}) == 2)


def test_adapters_come_from_a_url_and_prompts_go_where_their_beginning_was(cluster, root, tmp_path, answer, fleet):
    """Ray's own router for prefixes; the other fleet of this module is replaced.

    What `ray.serve.llm.request_router` has is this class, but it wants vLLM installed.
    """
    from ray.serve.config import RequestRouterConfig

    del fleet

    def with_prefixes(app):
        router = RequestRouterConfig(request_router_class=PREFIXES)
        bound = app._bound_deployment.init_args[0]._bound_deployment
        bound._deployment_config.request_router_config = router
        return app

    with running(f"file://{root}", tmp_path, with_prefixes):
        ask = {"model": "l16", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        assert post(cluster, ask).json()["choices"][0]["text"] == answer("l16")
        openings = [letter * 60 for letter in "abcdef"]
        homes = {text: settled(lambda text=text: which(cluster, "pocket", text), times=6) for text in openings}
        for text, home in homes.items():
            assert which(cluster, "pocket", text + " and more") == home
        assert len(set(homes.values())) == 2


def test_what_runs_ends_whole(cluster, root, tmp_path):
    with running(root, tmp_path):
        data = {**LONG, "model": "all", "stream": True}
        with httpx.stream("POST", f"{cluster}/v1/completions", json=data, headers=SECRET, timeout=60) as found:
            lines = found.iter_lines()
            next(lines)
            ending = threading.Thread(target=serve.delete, args=("pyreft",))
            ending.start()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        ending.join(60)
        assert not replicas()


def test_the_file_of_the_docs_runs_and_a_queue_brings_a_replica(cluster, root, tmp_path):
    """Ray's own command with the docs' configuration, but for model, sizes, GPUs and patience; the last test here."""
    (text,) = blocks(Path(__file__).parents[3] / "docs" / "fleet.md", "yaml")
    config = yaml.safe_load(yaml.safe_load(text)["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    small = {"model": None, "dtype": "auto", "gpus": 0, "adapters": str(root), "store": str(tmp_path / "store")}
    application["args"] |= {**small, **SMALL, "rows": 4, "queue": 20}
    (replica,) = application["deployments"]
    replica["ray_actor_options"] = {"num_cpus": 1}
    replica["autoscaling_config"] |= {
        "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 0, "look_back_period_s": 2,
    }  # fmt: skip
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    address = ray.get_runtime_context().gcs_address
    words = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(tmp_path / "fleet.yaml")]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        until(lambda: process.poll() is None and healthy(cluster), 300)
        assert len(replicas()) == 1
        end = time.monotonic() + 90
        while len(replicas()) < 2 and time.monotonic() < end:
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda _: post(cluster, {**LONG, "model": "pocket"}).status_code, range(8)))
            assert set(found) == {200}
        until(lambda: len({which(cluster, "pocket") for _ in range(10)}) == 2)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
