"""Servers of their own processes, started by `pyreft serve`, for the tests that ask one."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINE = [
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--enforce-eager",
    "--max-num-seqs",
    "8",
    "--block-size",
    "32",
]


def command(*words, engine="vllm"):
    return [sys.executable, "-m", "pyreft_cli", "serve", "--engine", engine, *map(str, words)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serving(folder, root, *words, engine=()):
    """Run vLLM's server of the adapters under `root`, see `started`; `engine` has further options of vLLM's."""
    return started(folder, "--adapters", root, *words, more=["--", *ENGINE, *engine])


@contextmanager
def started(folder, *words, engine="vllm", more=()):
    """Run a server; give its address and its process. Files of its own go to `folder`."""
    port = free_port()
    environment = {**os.environ, **ENVIRONMENT, "PYREFT_STORE": str(folder / "store")}
    environment.pop("VLLM_PLUGINS", None)
    words = command("--port", port, *words, *more, engine=engine)
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
            while not healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    pytest.fail(f"the server did not start: {log.read()[-3000:]}")
                time.sleep(1)
            yield url, process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()


def healthy(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False
