"""The server on transformers under load, and what clients see when it is told to end, or killed, meanwhile."""

import pytest

pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from running import started
from soaking import CLIENTS, TENANTS, soak

pytestmark = pytest.mark.slow
LONG = {"model": TENANTS[1], "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}


def serve(folder):
    return lambda root: started(folder, "--adapters", root, "--slots", 3, engine="transformers")


def test_nothing_is_mixed_up_and_nothing_grows_on_transformers(tmp_path):
    for url, process in soak(tmp_path, serve(tmp_path)):
        end = time.monotonic() + 20
        while any(
            figures(url)[f"pyreft_{name}"] for name in ("requests_waiting", "requests_reading", "answers_running")
        ):
            assert time.monotonic() < end, "those who went away hold something"
            time.sleep(0.5)
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = [pool.submit(ending, url) for _ in range(CLIENTS)]
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert {answer.result() for answer in answers} <= {"whole", "refused", "told", "cut"}
        assert process.wait(60) in (0, -signal.SIGTERM)


def figures(url):
    """What is at one moment, by the names of the gauges."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#" and "{" not in line}


def ending(url):
    """How a stream ends: whole, with an error that is told, cut, as where the grace of half a minute is over, or as a
    half that passes for a whole; or whether it is refused before it begins."""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
            if answer.status_code in (429, 503):
                return "refused"
            lines = [line for line in answer.iter_lines() if line]
    except httpx.ConnectError:
        return "refused"
    except httpx.HTTPError:
        return "cut"
    if lines[-1] == "data: [DONE]":
        return "told" if any('"error"' in line for line in lines) else "whole"
    return "half"
