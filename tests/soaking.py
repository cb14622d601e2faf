"""A server under load while adapters come, change and go, for the tests of both engines.

It ends after `PYREFT_SOAK_SECONDS`, 60 if nothing is said; an hour is 3600.
"""

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

import pyreft
from pyreft import pocket
from pyreft.serving.served import WEIGHTS
from served import save, save_all

SECONDS = float(os.environ.get("PYREFT_SOAK_SECONDS", "60"))
CLIENTS, TOKENS = 32, 8
TENANTS = [f"tenant-{number}" for number in range(6)]  # more than the slots
PROMPTS = ["What is a whale?", "Was ist ein Wal? ÄÖÜ", "鲸鱼是什么？🐳", "line\n\ttab \\ \" ' </s> \u200b", "a"]


class Truth:
    """Which answers a name may give: those of the weights that it had at some moment of the request."""

    def __init__(self, root):
        self.root, self.lock = root, threading.Lock()
        self.history = {}  # by name, when it began and what it answers from then on; none while it is away

    def answers(self, path):
        base, tokenizer = pocket.load()
        model = base if path is None else pyreft.ReftModel.from_pretrained(base, str(path))
        found = {}
        for prompt in PROMPTS:
            ids = tokenizer(pocket.PROMPT_TEMPLATE % prompt, return_tensors="pt")
            tokens = model.eval().generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=1)
            found[prompt] = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    def begin(self, name, answers):
        """From now on a name may answer so, and still as before; none while it may be away."""
        with self.lock:
            self.history.setdefault(name, []).append([time.monotonic(), float("inf"), answers])

    def settle(self, name):
        """From now on only as was last begun."""
        with self.lock:
            for entry in self.history[name][:-1]:
                entry[1] = min(entry[1], time.monotonic())

    def allowed(self, name, prompt, began, ended):
        """The answers between two moments; a change is seen up to a second late, see `Catalog`."""
        with self.lock:
            during = [made for start, end, made in self.history[name] if start <= ended and end >= began - 1]
        return {None if made is None else made[prompt] for made in during}


class Load:
    def __init__(self, url, truth):
        self.url, self.truth, self.counts, self.wrong = url, truth, Counter(), []
        self.end = time.monotonic() + SECONDS

    def client(self, seed):
        chance = random.Random(seed)
        actions = [self.say] * 6 + [self.stream] * 3 + [self.leave, self.huge, self.bad, self.unknown]
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while time.monotonic() < self.end:
                action = chance.choice(actions)
                try:
                    action(http, chance)
                except Exception as error:
                    self.wrong.append(f"{action.__name__}: {error!r}")
                self.counts[action.__name__] += 1

    def body(self, chance, **more):
        name = chance.choice([*TENANTS, "pocket", "comes-and-goes"])
        prompt = chance.choice(PROMPTS)
        messages = [{"role": "user", "content": prompt}]
        return name, prompt, {"model": name, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **more}

    def check(self, name, prompt, began, found):
        allowed = self.truth.allowed(name, prompt, began, time.monotonic())
        if found not in allowed:
            self.wrong.append(f"{name} answered {found!r} to {prompt!r}, not one of {allowed}")

    def say(self, http, chance):
        name, prompt, body = self.body(chance)
        began = time.monotonic()
        answer = http.post("/v1/chat/completions", json=body)
        if answer.status_code == 404:
            return self.check(name, prompt, began, None)
        made = answer.raise_for_status().json()
        assert made["model"] == name
        return self.check(name, prompt, began, made["choices"][0]["message"]["content"])

    def stream(self, http, chance):
        name, prompt, body = self.body(chance, stream=True)
        began = time.monotonic()
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code == 404:
                return self.check(name, prompt, began, None)
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert {event["model"] for event in events} == {name}
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        return self.check(name, prompt, began, text)

    def leave(self, http, chance):
        """Go away in the middle of an answer."""
        _, _, body = self.body(chance, stream=True)
        with http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 150}) as answer:
            next(answer.iter_lines(), None)

    def huge(self, http, chance):
        name, _, body = self.body(chance)
        body["messages"][0]["content"] = "whale " * 20_000
        assert http.post("/v1/chat/completions", json=body).status_code in (400, 404), name

    def bad(self, http, chance):
        raw = chance.choice(
            [b"{bad", b"[]", b"", b"\xff\xfe", b'{"model": "tenant-0"}', b"[" * 5000, b'{"model": NaN}']
        )
        headers = {"content-type": "application/json"}
        assert http.post("/v1/chat/completions", content=raw, headers=headers).status_code in (400, 404, 422)

    def unknown(self, http, chance):
        _, _, body = self.body(chance)
        body["model"] = chance.choice(["../tenant-0", "/etc/passwd", "TENANT-0", "鲸", "tenant-0/", "a" * 5000])
        assert http.post("/v1/chat/completions", json=body).status_code == 404


def change(load, root, versions):
    """Replace the first tenant's weights again and again, and let a name come and go."""
    turn, place, truth = 0, root / "comes-and-goes", load.truth
    while time.monotonic() < load.end:
        turn += 1
        path, answers = versions[turn % len(versions)]
        shutil.copy(path / WEIGHTS, root / ".weights")
        truth.begin(TENANTS[0], answers)
        os.replace(root / ".weights", root / TENANTS[0] / WEIGHTS)
        truth.settle(TENANTS[0])
        shutil.rmtree(root / ".away", ignore_errors=True)
        if turn % 2:
            shutil.copytree(path, root / ".away")
        truth.begin(place.name, answers if turn % 2 else None)
        os.replace(*(root / ".away", place) if turn % 2 else (place, root / ".away"))
        truth.settle(place.name)
        time.sleep(2)


def memory(process):
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in family if one.is_running())


def soak(folder, serve):
    """Load a server, and see that no answer is another tenant's or of old weights, and that memory does not grow.

    Args:
        folder: for the adapters and all else.
        serve: runs a server of a directory of adapters with three slots within a `with` block; gives its address and
            its process.

    Yields:
        its address and its process, once, when the load is over.
    """
    made, root = save_all(folder / "made"), folder / "adapters"
    root.mkdir()
    truth, kinds = Truth(root), sorted(made.iterdir())
    versions = [(path, truth.answers(path)) for path in (save(folder / f"v{n}", seed=50 + n) for n in range(3))]
    for number, name in enumerate(TENANTS):
        path, answers = versions[0] if not number else (kinds[number % len(kinds)], None)
        shutil.copytree(path, root / name)
        truth.begin(name, answers or truth.answers(path))
    truth.begin("pocket", truth.answers(None))
    truth.begin("comes-and-goes", None)
    with serve(root) as (url, process):
        load, family = Load(url, truth), psutil.Process(process.pid)
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            futures = [pool.submit(load.client, seed) for seed in range(CLIENTS)]
            futures.append(pool.submit(change, load, root, versions))
            time.sleep(SECONDS / 2)
            half = memory(family)
            for future in futures:
                future.result()
        print(f"{sum(load.counts.values())} requests in {SECONDS:.0f} s, {dict(load.counts)}", end="; ")
        print(f"{half / 2**20:.0f} MiB at half time, {memory(family) / 2**20:.0f} at the end")
        assert not load.wrong, (len(load.wrong), Counter(text[:60] for text in load.wrong), load.wrong[:5])
        assert min(load.counts.values()) > 0
        assert memory(family) - half < 0.05 * half
        yield url, process
