"""What a fleet is made of: arguments that are refused before anything starts, and what a gate reads of a body."""

import functools

import pytest

from pyreft.errors import ReftError

pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'pyreft[ray]'")


def refused(**args):
    from pyreft.serving.fleet import build

    with pytest.raises(ReftError) as caught:
        build(args)
    return str(caught.value)


def test_what_cannot_work_is_told_before_anything_starts(tmp_path):
    assert refused(adaptors="x") == "'adaptors' is not known. Did you mean 'adapters'?"
    assert refused(port=8000) == "port: is not for a fleet: set it in Ray Serve's http_options."
    assert refused(allow_loading=True).startswith("allow_loading: is not for a fleet: replicas share")
    assert refused(rows="many").startswith("rows: Input should be a valid integer")
    assert refused(adapters=str(tmp_path / "none")).endswith("expected a directory with a folder for each adapter.")
    assert refused(adapters=f"file://{tmp_path}/none").endswith("expected a place with a folder for each adapter.")
    assert refused(model="some/model") == "adapters: expected a directory whose folders are the adapters."
    assert refused(api_key="a b=").startswith("api_key: a key names no model")
    assert refused(min_replicas=3, max_replicas=2) == "max_replicas: expected 3 or more, got 2."
    assert refused(min_replicas=0).startswith("min_replicas: expected 1 or more, got 0")


def test_what_is_of_one_engine_is_refused_with_the_other():
    assert refused(engine="tgi") == "engine: Input should be 'transformers' or 'vllm', got 'tgi'."
    assert refused(vllm="--max-model-len 9") == "engine: '--max-model-len' is for the engine vllm."
    for name, value in {"dtype": "float32", "cache": 1, "max_prompt": 9, "max_tokens": 9}.items():
        message = f"{name}: is for the engine transformers; vLLM has arguments of its own."
        assert refused(engine="vllm", **{name: value}) == message
    assert refused(engine="vllm", api_key="a=l4") == "api_key: keys for some models are for the engine transformers."
    for word, own in {"--port": "port", "--api_key": "api_key", "--max-num-seqs": "rows"}.items():
        message = f"vllm: {word}=9: a fleet has one of its own; set {own}."
        assert refused(engine="vllm", vllm=f"--max-model-len 64 {word}=9") == message


@pytest.mark.parametrize(
    "words", ["--max-model-len 64 --dtype float32", ["--max-model-len", "64", "--dtype", "float32"]]
)
def test_arguments_of_vllm_are_words_or_text(words):
    from pyreft.serving.fleet import build

    gate = build({"engine": "vllm", "vllm": words, "rows": 9, "api_key": "a"})
    replicas = gate._bound_deployment.init_args[0]._bound_deployment
    options = replicas.init_args[0]
    assert [*options.vllm] == ["--max-model-len", "64", "--dtype", "float32"]
    assert (replicas.name, replicas.func_or_class.__name__, replicas.max_ongoing_requests) == (
        "Replica",
        "VllmReplica",
        9,
    )


def test_figures_of_replicas_are_told_together():
    pytest.importorskip("prometheus_client")
    from pyreft.serving.api.gauges import Gauges
    from pyreft.serving.fleet.figures import together

    texts = []
    for number in (1, 2):
        gauges = Gauges({"answers_running": ("Answers that grow", lambda number=number: number)})
        gauges.requests.labels('l"4', "done").inc(number)
        gauges.first.labels("l4").observe(0.02)
        texts.append((f"r{number}", gauges.text().decode()))
    lines = together(texts).decode().splitlines()
    assert next(line for line in lines if line.startswith("# TYPE pyreft_requests")) == (
        "# TYPE pyreft_requests_total counter"
    )
    assert lines.count("# HELP pyreft_requests_total Requests by how they ended") == 1
    for number in (1, 2):
        assert f'pyreft_requests_total{{model="l\\"4",outcome="done",replica="r{number}"}} {number}.0' in lines
        assert f'pyreft_first_token_seconds_bucket{{le="0.025",model="l4",replica="r{number}"}} 1.0' in lines
        assert f'pyreft_answers_running{{replica="r{number}"}} {number}.0' in lines
    assert "pyreft_replicas 2.0" in lines
    assert together([]).decode().splitlines()[-1] == "pyreft_replicas 0.0"


def test_arguments_are_values_or_text(monkeypatch):
    from pyreft.serving.fleet import build

    monkeypatch.setenv("PYREFT_API_KEY", "one two=pocket")
    gate = build({"rows": "3", "queue": 5, "max_replicas": "4", "gpus": "0.5", "timeout": "9"})
    replicas = gate._bound_deployment.init_args[0]._bound_deployment
    options = replicas.init_args[0]
    assert (options.rows, options.queue, options.timeout) == (3, 5, 9.0)
    assert [*options.api_key] == ["one", "two=pocket"]
    assert (replicas.max_ongoing_requests, replicas.max_queued_requests) == (3, 5)
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 2)
    assert replicas.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a\nb"),
        ({"prompt": [1, 2]}, "-"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"text": "u"}]}]}, "s\nu"),
        ({"instructions": "i", "input": [{"role": "user", "content": "u"}]}, "i\nu"),
        ({"messages": 3, "prompt": None}, "-"),
        ({"prompt": functools.reduce(lambda inner, _: [inner], range(9999), "deep")}, "deep"),
        ({}, "-"),
    ],
)
def test_a_prompt_as_text(body, text):
    from pyreft.serving.fleet.passing import prompt_text

    assert prompt_text(body) == text
