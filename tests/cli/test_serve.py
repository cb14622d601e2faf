"""`pyreft serve`: what it refuses at the start, and how it ends."""

import json
import signal
import socket
import urllib.request

import pytest
from typer.testing import CliRunner

from pyreft.errors import ReftError
from pyreft_cli.app import app
from running import started


def refused(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = CliRunner().invoke(app, ["serve", "--port", str(port), *map(str, words)])
    assert isinstance(done.exception, ReftError), done.output
    return str(done.exception)


def test_what_cannot_work_is_told_at_once(tmp_path):
    pytest.importorskip("fastapi")
    assert refused("--engine", "tgi").startswith("engine: expected transformers or vllm, got 'tgi'.")
    assert refused("--adapters", tmp_path / "none").endswith(
        "none: expected a directory with a folder for each adapter."
    )
    assert refused("--model", "some/model") == "adapters: expected a directory whose folders are the adapters."
    assert refused("--", "--max-model-len", "9") == "engine: '--max-model-len' is for --engine vllm."
    assert refused("--engine", "vllm", "--rows", "3").startswith("rows: is for --engine transformers")
    assert refused("--engine", "vllm", "--replicas", "2", "--print").startswith("print: is for a single server")
    assert refused("--api-key", "a=").startswith("api_key: a key names no model")
    assert refused("--api-key", "YWJj==").startswith("api_key: a key names no model")
    assert refused("--dtype", "float8").startswith("dtype: expected ")
    assert refused("--host", "192.0.2.1").startswith("port: cannot listen at 192.0.2.1:")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused("--port", port).startswith(f"port: cannot listen at 127.0.0.1:{port} (Address already in use)")


def test_an_adapter_may_not_have_the_base_s_name(tmp_path):
    pytest.importorskip("fastapi")
    from served import save

    save(tmp_path / "pocket")
    message = refused("--adapters", tmp_path, "--store", tmp_path / "store")
    assert message == "name: an adapter has the base model's name 'pocket'; give another --name."


def test_where_it_listens_is_told_as_an_address(capsys):
    from pyreft_cli.serve import tell

    tell({"quiet": False, "host": "::1", "port": 8000, "name": "pocket", "engine": "vllm"}, [])
    assert capsys.readouterr().out == "Serving pocket and 0 adapters at http://[::1]:8000/v1\n"


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_it_ends_when_what_runs_has_ended(tmp_path, replicas):
    pytest.importorskip("fastapi" if replicas == 1 else "ray")
    body = {"model": "emoji", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with started(tmp_path, "--replicas", replicas, engine="transformers") as (url, process):
        asked = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)
            assert answer.read().decode().rstrip().endswith("data: [DONE]")
        assert process.wait(60) in (0, -signal.SIGTERM)
    log = (tmp_path / "server.log").read_text()
    count = "1 adapter" if replicas == 1 else "adapters"
    assert f"Serving pocket and {count} at {url}/v1\n" in log
