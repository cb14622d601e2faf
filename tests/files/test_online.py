"""Adapters of the hub, by names that are in its cache already: nothing is downloaded."""

import json
import shutil

import huggingface_hub
import pytest

from commands import run
from pyreft import ReftError, pocket
from pyreft.files.online import hub_told, on_disk

COMMIT = "0" * 40


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """The demo's adapter as `owner/emoji`, offline and in a place that has no directory of the name."""
    cached = tmp_path / "hub" / "models--owner--emoji"
    shutil.copytree(pocket.adapters() / "emoji", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return cached / "snapshots" / COMMIT


def test_commands_take_an_adapter_by_its_name_on_the_hub(on_the_hub):
    assert on_disk("owner/emoji") == str(on_the_hub)
    assert json.loads(run("info", "owner/emoji", "--json").stdout)["base_model"] == "pocket"
    words = ("--prompt", "What is a whale?", "--json")
    answers = [run("generate", "--adapter", name, *words).stdout for name in ("owner/emoji", on_the_hub)]
    assert answers[0] == answers[1]


def test_what_is_here_comes_before_the_hub(on_the_hub, tmp_path):
    here = shutil.copytree(on_the_hub, tmp_path / "here" / "owner" / "emoji")
    assert on_disk("owner/emoji") == "owner/emoji"
    assert on_disk(str(here / "adapter_config.json")) == str(here)
    with pytest.raises(ReftError, match=r"^owner/emojis: expected an adapter's directory, there is nothing of this"):
        on_disk("owner/emojis")


def test_a_name_that_is_nowhere(on_the_hub):
    with pytest.raises(
        ReftError, match=r"^owner/other: there is no such directory, and the hub gives no such adapter:"
    ):
        on_disk("owner/other")
    for name in ("other", "owner/other/one", "../there/other", "~no-such-user/other"):
        with pytest.raises(ReftError, match="expected an adapter's directory, there is nothing of this name"):
            on_disk(name)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    with pytest.raises(ReftError, match=r"^it cannot be written: ."), hub_told("it cannot be written"):
        huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="t").create_repo("owner/name")
