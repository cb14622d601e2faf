"""What comes of a job: the best adapter, answers before and after, the base model's name, an upload."""

import base64
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from transformers import DataCollatorForSeq2Seq

import pyreft
from conftest import tiny_llama
from pyreft import pocket
from pyreft.files.adapter import read_config, remembered
from pyreft.jobs.held_out import mean_loss
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.publish import check_repository, publish
from pyreft.jobs.samples import samples
from pyreft.jobs.settings import TrainingJob, check_settings
from pyreft.loading import base_of, load_adapted

# it learns seven pairs by heart, at the cost of the other three
EAGER = {"layers": "1;2;3", "positions": "l4", "rank": 4, "lr": 0.03, "epochs": 30, "validation_split": 0.3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A job that ended early, its figures and its directory."""
    place = tmp_path_factory.mktemp("eager")
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pocket.emoji_pairs()), encoding="utf-8")
    job = PreparedJob(TrainingJob(data=str(data), output=str(place / "out"), early_stopping=2, **EAGER))
    return job, job.train(), place / "out"


def test_a_training_ends_early_and_keeps_the_best_adapter(trained):
    job, result, out = trained
    assert result["steps"] == result["best_step"] + 2 < 30
    kept, tokenizer = load_adapted(out)
    loss = mean_loss(kept, [DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(job.validation)])
    assert loss == pytest.approx(result["best"], rel=1e-4)
    assert loss < result["validation_loss"]


def test_answers_before_and_after_are_those_of_held_out_prompts(trained):
    job, _, out = trained
    found = samples(job)
    assert len(found) == 3
    pairs = {pair["prompt"]: pair["completion"] for pair in pocket.emoji_pairs()}
    assert [sample.expected for sample in found] == [pairs[sample.prompt].strip() for sample in found]
    assert not {sample.prompt for sample in found} & {example.messages[0]["content"] for example in job.examples}
    base, tokenizer = pocket.load()
    text = pocket.PROMPT_TEMPLATE % found[0].prompt
    for model, wanted in ((load_adapted(out)[0], found[0].after), (base, found[0].before)):
        tokens = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=48, do_sample=False)
        answer = tokenizer.decode(tokens[0, len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True).strip()
        assert answer == wanted


def test_a_row_without_a_prompt_is_not_asked(trained):
    """As an empty prompt is, where no token is put before it and the edits are at every token."""
    job, _, _ = trained
    bare = [{"input_ids": row["input_ids"], "labels": list(row["input_ids"])} for row in job.validation]
    assert samples(job)[0].prompt == job.validation_examples[0].messages[0]["content"]
    some = replace_rows(job, [bare[0], *job.validation[1:]])
    assert {sample.prompt for sample in samples(some)} <= {
        example.messages[0]["content"] for example in job.validation_examples[1:]
    }
    assert not samples(replace_rows(job, bare))


def replace_rows(job, rows):
    other = copy.copy(job)
    other.validation = rows
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": True}, "best: the best adapter has the lowest validation loss; give `validation`"),
        ({"early_stopping": 2}, "early_stopping: the best adapter has the lowest"),
        ({"early_stopping": 0, "validation": "b"}, "early_stopping: expected a number above 0, got 0"),
        (
            {"best": True, "validation": "b", "save_steps": 3},
            "save_steps: with `best` there is a checkpoint after each",
        ),
        ({"suite": "glue", "push_to_hub": "a/b"}, "push_to_hub: each task has an adapter of its own"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(pyreft.ReftError, match=message):
        check_settings(TrainingJob(**{"data": None if "suite" in changes else "a"} | changes))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de3",
            "meta-llama/Llama-3.2-1B",
        ),
        ("/hub/models--gpt2/snapshots/607a30d", "gpt2"),
        ("/home/me/snapshots/model", "/home/me/snapshots/model"),
        ("some/base", "some/base"),
        ("", None),
        (None, None),
    ],
)
def test_a_base_model_is_remembered_by_its_name_on_the_hub(path, name):
    assert remembered(path) == name
    model = tiny_llama()
    model.name_or_path = path or ""
    assert (
        pyreft.get_reft_model(model, pyreft.ReftConfig(layers=[1], intervention="loreft"))
        .peft_config["default"]
        .base_model_name_or_path
        == name
    )


def test_the_embedded_model_is_remembered_by_its_name(trained):
    assert read_config(trained[2]).base_model_name_or_path == base_of(trained[2]) == "pocket"
    card = (trained[2] / "README.md").read_text()
    assert "base = pocket.path()" in card
    assert "base_model:" not in card


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's API to take an upload."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.asked.append((self.path, self.headers.get("authorization"), body))
        answer = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/me/adapter"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.url}/me/adapter/commit/1", "commitOid": "1"}
        self.send(self.server.status, answer)

    def do_GET(self):
        self.send(self.server.status, {})

    def send(self, status, answer):
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.asked, server.status = f"http://127.0.0.1:{server.server_port}", [], 200
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_adapter_is_uploaded_without_its_checkpoints(hub, trained):
    out = trained[2]
    assert (out / "checkpoints").is_dir()
    check_repository("me/adapter")
    assert publish(out, "me/adapter") == f"{hub.url}/me/adapter"
    created = next(json.loads(body) for path, _, body in hub.asked if path == "/api/repos/create")
    assert created.get("visibility") == "private" or created.get("private") is True
    path, token, body = next(asked for asked in hub.asked if "/commit/" in asked[0])
    assert (path.startswith("/api/models/me/adapter/commit/"), token) == (True, "Bearer hf_secret")
    files = {}
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    assert files == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_what_stands_in_the_way_of_an_upload(hub, trained, monkeypatch):
    with pytest.raises(pyreft.ReftError, match="push_to_hub: expected owner/name, got 'a b'"):
        check_repository("a b")
    hub.status = 403
    with pytest.raises(pyreft.ReftError, match=r"push_to_hub: 'me/adapter' cannot be written: .*403"):
        check_repository("me/adapter")
    with pytest.raises(pyreft.ReftError, match=r"was not uploaded: .* Later: hf upload me/adapter .* --exclude"):
        publish(trained[2], "me/adapter")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(trained[2] / "none"))
    with pytest.raises(pyreft.ReftError, match="nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN"):
        check_repository("me/adapter")
