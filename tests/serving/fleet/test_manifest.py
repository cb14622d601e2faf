"""The values for Kubernetes in the docs."""

from pathlib import Path

import pytest
import yaml

from snippets import blocks

PAGE = Path(__file__).parents[3] / "docs" / "fleet.md"


@pytest.fixture
def manifest():
    (text,) = blocks(PAGE, "yaml")
    return yaml.safe_load(text)


def test_the_cluster_has_what_the_replicas_ask_for(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (replica,) = application["deployments"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    scaling = replica["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) == replica["ray_actor_options"]["num_gpus"]
    assert int(worker["resources"]["limits"]["cpu"]) >= replica["ray_actor_options"]["num_cpus"]
    assert worker["image"] == head["image"]
    mounted = worker["volumeMounts"][0]
    assert application["args"]["store"].startswith(mounted["mountPath"])
    assert [volume["name"] for volume in group["template"]["spec"]["volumes"]] == [mounted["name"]]


def test_ray_serve_takes_the_configuration(manifest):
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed: pip install 'pyreft[ray]'")
    from pyreft.serving.fleet import build

    found = schema.ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = found.applications
    assert application.import_path == "pyreft.serving.fleet:build"
    args = dict(application.args)
    gate = build({**args, "adapters": None, "model": None})  # the bucket is an example
    names = {"Gate", gate._bound_deployment.init_args[0]._bound_deployment.name}
    assert {deployment.name for deployment in application.deployments} <= names
