"""The manifests for KubeRay against the documented fields of its objects."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.cluster_files import MANIFESTS, ROOT
from cluster.kuberay_schema import problems

JOB, SERVICE = MANIFESTS


def cluster_of(path: Path) -> dict[str, Any]:
    spec = yaml.safe_load(path.read_text())["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return found


def groups_of(path: Path) -> list[dict[str, Any]]:
    return [cluster_of(path)["headGroupSpec"], *cluster_of(path)["workerGroupSpecs"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_takes_the_manifest(path: Path) -> None:
    assert problems(path.read_text()) == []


BREAKS = {
    "no entrypoint": (JOB, "  entrypoint: >-", "  metadata: >-", "'entrypoint' is a required property"),
    "no image": (JOB, "              image: m2d:ray", "              ports: m2d:ray", "'image' is a required property"),
    "no head": (SERVICE, "    headGroupSpec:", "    headGroup:", "'headGroupSpec' is a required property"),
    "a number for a text": (JOB, 'num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
    "a text for a number": (JOB, "backoffLimit: 2", "backoffLimit: twice", "'twice' is not of type 'integer'"),
    "an unknown mode": (JOB, "mode: token", "mode: password", "'password' is not one of"),
    "a misspelt field": (JOB, "shutdownAfterJobFinishes", "shutdownAfterJobFinish", "shutdownAfterJobFinish"),
    "an unknown size": (SERVICE, "sizeLimit: 5Gi", "sizeLimit: 5 gigabytes", "5 gigabytes"),
    "another kind": (JOB, "kind: RayJob", "kind: RayTask", "RayTask"),
    "an old version": (SERVICE, "ray.io/v1\n", "ray.io/v1alpha1\n", "'ray.io/v1' was expected"),
    "no application": (SERVICE, "        import_path: m2d.serving.app:app\n", "", "'import_path' is a required"),
    "broken YAML": (JOB, "  name: m2d-train", "  name: {m2d-train", "not YAML"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_caught(name: str) -> None:
    path, whole, broken, told = BREAKS[name]
    text = path.read_text()
    assert whole in text
    found = problems(text.replace(whole, broken, 1))
    assert any(told in line for line in found), found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_strangers_are_kept_out(path: Path) -> None:
    assert cluster_of(path)["authOptions"] == {"mode": "token"}
    assert cluster_of(path)["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in groups_of(path):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_shared_memory_holds_the_object_store(path: Path) -> None:
    for group in groups_of(path):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        size = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        assert size >= 1.05 * int(group["rayStartParams"]["object-store-memory"])
        for container in group["template"]["spec"]["containers"]:
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_the_job_has_a_gpu_for_each_of_its_workers() -> None:
    words = yaml.safe_load(JOB.read_text())["spec"]["entrypoint"].split()
    gpus = 0
    for group in cluster_of(JOB)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["replicas"] * limits["nvidia.com/gpu"]
    assert words[words.index("--num_workers") + 1] == str(gpus)


def test_the_service_names_an_application_or_says_that_there_is_none_yet() -> None:
    text = SERVICE.read_text()
    serve = yaml.safe_load(yaml.safe_load(text)["spec"]["serveConfigV2"])
    module, _, name = serve["applications"][0]["import_path"].partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        assert text.startswith("# NOT USABLE YET: ")
        return
    assert "NOT USABLE YET" not in text
    tree = ast.parse(path.read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined | {target.id for target in targets if isinstance(target, ast.Name)}
