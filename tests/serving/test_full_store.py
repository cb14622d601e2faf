"""A store whose disk is full or may not be written: those who ask for a new adapter are told, and nobody else."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from disks import limited, small_disk
from pyreft.serving.catalog import Catalog, Store, StoreError
from served import Running, engine, save_all

SAY = [{"role": "user", "content": "What is a whale?"}]
CAUSES = {"full": "No space left on device", "protected": "Read-only file system", "limited": "File too large"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=CAUSES)
def disk(request, tmp_path):
    """A place for a store that can take no more once it is told to, and what the system says then."""
    kind = request.param
    with (limited if kind == "limited" else small_disk)(tmp_path / "store") as found:
        if found is None:
            pytest.skip("no file system may be mounted here")
        found.refuse = found.protect if kind == "protected" else found.fill
        found.cause = CAUSES[kind]
        yield found


def test_a_copy_that_cannot_be_made_is_told_and_leaves_nothing(root, disk):
    catalog = Catalog(root, Store(disk.path), seconds=0)
    known = catalog.resolve("l4")
    disk.refuse()
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"^{disk.path} cannot take an adapter: {disk.cause}$"):
            catalog.resolve("l16")
    assert catalog.resolve("l4") == known
    assert Catalog(root, Store(disk.path)).resolve("l4") == known  # a server that starts now has it, too
    assert {path.name for path in disk.path.iterdir()} - {"filler"} == {known.digest}
    disk.free()
    assert catalog.resolve("l16").edits()


def test_the_server_says_so_and_lives_on(root, disk, tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")
    running = Running(root, disk.path)

    def say(name):
        body = {"model": name, "messages": SAY, "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)

    try:
        known = say("l4").json()["choices"]
        disk.refuse()
        check_told(say("l16"), "l16", disk)
        loading = {"adapter_name": "more", "adapter_path": str(root / "all")}
        check_told(httpx.post(f"{running.url}/v1/load_adapter", json=loading), "more", disk)
        assert say("l4").json()["choices"] == known
        assert say("pocket").status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200
        disk.free()
        assert say("l16").status_code == 200
    finally:
        disk.free()
        running.stop()


def check_told(found, name, disk):
    assert (found.status_code, found.headers["retry-after"]) == (503, "5")
    told = f"The server's store cannot take {name!r} now: {disk.cause}. Adapters that are in it are answered."
    error = {"message": told, "type": "server_error", "param": "model", "code": "store_cannot_take"}
    assert found.json() == {"error": error}


def test_the_front_of_vllm_says_the_same(root, disk):
    """Of its own, without an engine: `test_server.py` asks the whole server."""
    pytest.importorskip("fastapi")
    from pyreft.serving.vllm.flags import Settings
    from pyreft.serving.vllm.front import Front

    config = engine(Settings(adapters=str(root), store=str(disk.path)))
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")])
    state = SimpleNamespace(vllm_config=config, openai_serving_models=models)
    headers = [(b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": SimpleNamespace(state=state)}

    def ask(name):
        got = []

        async def receive():
            return {"type": "http.request", "body": json.dumps({"model": name}).encode()}

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        async def send(message):
            got.append(message)

        asyncio.run(Front(app)(scope, receive, send))
        told = {key.decode(): value.decode() for key, value in got[0]["headers"]}
        return SimpleNamespace(status_code=got[0]["status"], headers=told, json=lambda: json.loads(got[1]["body"]))

    assert ask("l4").status_code == 200
    disk.refuse()
    check_told(ask("l16"), "l16", disk)
    assert ask("l4").status_code == 200
    disk.free()
    assert ask("l16").status_code == 200
