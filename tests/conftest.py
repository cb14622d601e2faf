"""Tiny models made in the test, seeded; one thread for each worker."""

import os
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch reads it; the programs that tests start have it, too

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, LlamaConfig

from pyreft.interventions import INTERVENTIONS
from pyreft.tuner.caches import cache_name

FORMULAS = [*INTERVENTIONS]  # of the library; tests register more

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")

# what answers in under a minute, and is most likely to notice a mistake: `pytest -m fast`
FAST = (
    *("test_errors", "test_house", "test_positions", "data/test_data_files", "files/test_pickles", "files/test_text"),
    *("interventions/test_interventions", "places/test_components", "reach/test_store", "serving/test_tokens"),
    *("tasks/test_metrics", "tuner/test_config", "tuner/test_layer", "tuner/test_streams"),
)


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    files = {tests / f"{name}.py" for name in FAST}
    for item in items:
        if item.path in files:
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_llama(**changes):
    """A random Llama whose greedy choices are far apart, so that rounding cannot turn them."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes | changes)).eval()


CACHE = cache_name(tiny_llama())  # by which name models of this transformers take and return keys and values


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def prompts():
    """Prompts of different lengths, as lists of ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 3, 6, 1)]


def pad(rows, side, pad_id=0):
    """Return ids and mask of rows padded on one side."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(f)
        for r, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def shaken(adapted):
    """Make the edits large, so that a wrong location cannot go unnoticed."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "reft_" in name:
                parameter.add_(torch.randn_like(parameter))
    return adapted.eval()


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """A server of the API on the embedded model, with an adapter of each kind."""
    pytest.importorskip("fastapi", reason="the API is not installed: pip install 'pyreft[serve]'")
    from served import Running, save_all

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
