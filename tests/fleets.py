"""A fleet of two real replicas on this machine, for the tests that ask one."""

import os
import shutil
import socket
import time
from contextlib import contextmanager

import httpx
import torch

import pyreft
from pyreft import pocket

SAY = [{"role": "user", "content": "What is a whale?"}]
PROMPT = pocket.PROMPT_TEMPLATE % SAY[0]["content"]
# on a busy machine a replica answers late how many requests it has, and Ray's router would choose another
PATIENT = {
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "30",
}
SECRET = {"authorization": "Bearer secret"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started_cluster():
    """Ray on this machine, for a `with` block; gives the address of its proxy."""
    import ray
    from ray import serve

    os.environ.update(PATIENT)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def start(root, store, change=lambda app: app, **more):
    """Run a fleet of two, in the place of one that runs."""
    from ray import serve

    from pyreft.serving.fleet import build

    args = {"adapters": str(root), "store": str(store), "min_replicas": 2, "max_replicas": 2, **more}
    serve.run(change(build(args)), name="pyreft")


def answers(root):
    """What `generate` answers to `PROMPT` with an adapter, none for the base: a function of its name."""
    known = {}

    def find(name):
        if name not in known:
            model, tokenizer = pocket.load()
            if name is not None:
                model = pyreft.ReftModel.from_pretrained(model, str(root / name)).eval()
            ids = tokenizer(PROMPT, return_tensors="pt")
            with torch.no_grad():
                made = model.generate(**ids, max_new_tokens=12)
            known[name] = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return known[name]

    return find


def post(url, data, path="/v1/completions", key="secret", **more):
    return httpx.post(url + path, json=data, headers={"authorization": f"Bearer {key}"}, timeout=120, **more)


def which(url, model, prompt="a"):
    """The replica that answers."""
    found = post(url, {"model": model, "prompt": prompt, "max_tokens": 1})
    assert found.status_code == 200, found.text
    return found.headers["x-reft-replica"]


def homes_of_new(url, root, count):
    """Add adapters that no replica has, ask each once, and return where that was by its name."""
    homes = {}
    for number in range(count):
        name = f"new-{number}"
        shutil.copytree(root / "l4", root / name)
        until(lambda name=name: name in [one["id"] for one in get(url, "/v1/models").json()["data"]])
        time.sleep(6)  # the gate lists a place every five seconds, and Ray tells its router in less who holds what
        homes[name] = which(url, name)
    time.sleep(2)
    return homes


def get(url, path):
    return httpx.get(url + path, headers=SECRET, timeout=60)


def settled(ask, times=10, most=120):
    """What the same question leads to once it always leads to the same: Ray tells its router some time later."""
    found = []
    while len(found) < most:
        found.append(ask())
        if len(found) >= times and len(set(found[-times:])) == 1:
            return found[-1]
    raise AssertionError(found)


def replicas():
    """Ray's actors by the replicas' ids."""
    import ray

    named = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    names = [name for name in named if name and name.startswith("SERVE_REPLICA::pyreft#Replica#")]
    return {name.rpartition("#")[2]: ray.get_actor(name, namespace="serve") for name in names}


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    assert found
    return found


def figures(url):
    """What `/metrics` says: each line's value by its name and labels."""
    found = get(url, "/metrics")
    assert found.status_code == 200, found.text
    lines = [line for line in found.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def total(url, name, **labels):
    """One figure, summed over all replicas and whatever else is not said."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    found = {key: value for key, value in figures(url).items() if key.partition("{")[0] == name}
    return sum(value for key, value in found.items() if all(label in key for label in wanted))
