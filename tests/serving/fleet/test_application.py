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
