"""The manifests for KubeRay against the documented fields of its objects.

The fields that docs/cluster uses, their names, types and what is required: the API reference of ray.io/v1 (KubeRay 1.5
to 1.7) and Kubernetes' PodSpec. A field that is not listed is refused, as `kubectl apply --validate=strict` refuses an
unknown one, so a manifest that needs another one needs it here first. rayStartParams is required by older operators.
"""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster.cluster_files import MANIFESTS

from m2d.cli import parse

JOB, SERVICE = MANIFESTS
Schema = dict[str, Any]


def record(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others. required: their names, with spaces between."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def many(entry: Schema) -> Schema:
    return {"type": "array", "items": entry, "minItems": 1}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def text(pattern: str = "") -> Schema:
    return {"type": "string", "pattern": pattern}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


TEXT, FLAG, COUNT = text(), {"type": "boolean"}, {"type": "integer", "minimum": 0}
NAME = text(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
QUANTITY = {"anyOf": [COUNT, text(r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]}
METADATA = record("name", name=NAME, namespace=NAME, labels=mapping(TEXT), annotations=mapping(TEXT))
SECRET_KEY = record("name key", name=NAME, key=TEXT, optional=FLAG)
CONTAINER = record(
    "name image resources",
    name=NAME,
    image=TEXT,
    env=many(record("name", name=TEXT, value=TEXT, valueFrom=record("secretKeyRef", secretKeyRef=SECRET_KEY))),
    ports=many(record("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535}, name=NAME)),
    resources=record("requests limits", requests=mapping(QUANTITY), limits=mapping(QUANTITY)),
    volumeMounts=many(record("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    "name",
    name=NAME,
    persistentVolumeClaim=record("claimName", claimName=NAME, readOnly=FLAG),
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
) | {"minProperties": 2, "maxProperties": 2}  # the name and one source
POD = record(
    "containers",
    containers=many(CONTAINER),
    volumes=many(VOLUME),
    tolerations=many(
        record(
            key=TEXT,
            operator=one_of("Exists", "Equal"),
            value=TEXT,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    securityContext=record(runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT, runAsNonRoot=FLAG),
    restartPolicy=one_of("Always", "OnFailure", "Never"),
)
GROUP = {
    "rayStartParams": mapping(TEXT),  # numbers too are given as strings
    "template": record("spec", metadata=record(labels=mapping(TEXT), annotations=mapping(TEXT)), spec=POD),
}
RAY_CLUSTER = record(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    authOptions=record("mode", mode=one_of("disabled", "token"), secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(idleTimeoutSeconds=COUNT, upscalingMode=one_of("Default", "Aggressive", "Conservative")),
    headGroupSpec=record(
        "rayStartParams template", serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), **GROUP
    ),
    workerGroupSpecs=many(
        record(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            **GROUP,
        )
    ),
)
SPECS = {
    "RayJob": record(
        "entrypoint rayClusterSpec",  # either could be left out where another Ray cluster is selected; here neither may
        entrypoint=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterPodTemplate=GROUP["template"],
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=RAY_CLUSTER,
    ),
    "RayService": record("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER),
}
HTTP = record("host port", host=TEXT, port=COUNT, keep_alive_timeout_s=COUNT)
APPLICATION = record(
    "name import_path",
    name=TEXT,
    import_path=text(r"^[\w.]+:\w+$"),
    route_prefix=text("^/"),
    runtime_env={"type": "object"},
    args={"type": "object"},
    deployments={"type": "array"},
)


def problems(manifest_text: str) -> list[str]:
    """What KubeRay, Kubernetes or Serve would refuse in a manifest, one line each; none for a good one."""
    try:
        manifest = yaml.safe_load(manifest_text)
    except yaml.YAMLError as error:
        return [f"not YAML: {' '.join(str(error).split())}"]
    kind = manifest.get("kind")
    if kind not in SPECS:
        return [f"kind: {kind} is neither RayJob nor RayService"]
    version = {"const": "ray.io/v1"}
    whole = record("apiVersion kind metadata spec", apiVersion=version, kind=TEXT, metadata=METADATA, spec=SPECS[kind])
    errors = list(jsonschema.Draft202012Validator(whole).iter_errors(manifest))
    if not errors and kind == "RayService":
        serve = jsonschema.Draft202012Validator(
            record("http_options applications", http_options=HTTP, applications=many(APPLICATION))
        )
        errors = list(serve.iter_errors(yaml.safe_load(manifest["spec"]["serveConfigV2"])))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


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
    "no application": (
        SERVICE,
        "        import_path: m2d.serving.deployment:app_builder\n",
        "",
        "'import_path' is a required",
    ),
    "broken YAML": (JOB, "  name: m2d-train", "  name: {m2d-train", "not YAML"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_caught(name: str) -> None:
    path, whole, broken, told = BREAKS[name]
    good = path.read_text()
    assert whole in good
    found = problems(good.replace(whole, broken, 1))
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


def test_the_service_is_the_one_that_serves_and_asks_everybody_for_a_key(tmp_path: Path) -> None:
    """tests/serving/test_serve.py starts it."""
    (served,) = serve_config()["applications"]
    assert served["import_path"] == "m2d.serving.deployment:app_builder"
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(served["args"]))
    settings = parse("serve", ["--config", str(tmp_path / "args.yaml")])
    assert settings.host == serve_config()["http_options"]["host"] == "0.0.0.0"
    assert settings.keys is not None
    (mount,) = {
        mount["mountPath"]
        for group in groups_of(SERVICE)
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == "shared"
    }
    places = [*settings.checkpoint, settings.checkpoints_root, settings.directory, settings.keys]
    assert all(Path(place).is_relative_to(mount) for place in places)


def serve_config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(yaml.safe_load(SERVICE.read_text())["spec"]["serveConfigV2"])
    return found
