"""One server for all tests of the API, on the embedded model with an adapter of each kind."""

import pytest

from served import Running, save_all


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")
    root = save_all(tmp_path_factory.mktemp("served"))
    keys = ["secret", "mine=l4,pocket"]
    made = Running(root, tmp_path_factory.mktemp("store"), api_key=keys, max_prompt=200)
    made.root = root
    yield made
    made.stop()


@pytest.fixture
def client(running):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
