"""The fields of KubeRay's RayJob and RayService that docs/cluster uses, as JSON schema.

Names, types and what is required: the API reference of ray.io/v1 (KubeRay 1.5 to 1.7) and Kubernetes' PodSpec. Only a
part of them: a field that is not listed is refused, as `kubectl apply --validate=strict` refuses an unknown one, so a
manifest that needs another field needs it here, with its type, first. rayStartParams is required by older operators.
"""

from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {
    "anyOf": [COUNT, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}],
}


def record(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others. required: their names, with spaces between."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def many(entry: Schema) -> Schema:
    return {"type": "array", "items": entry, "minItems": 1}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


METADATA = record("name", name=NAME, namespace=NAME, labels=mapping(TEXT), annotations=mapping(TEXT))
SECRET_KEY = record("name key", name=NAME, key=TEXT, optional=FLAG)
ENVIRONMENT = record("name", name=TEXT, value=TEXT, valueFrom=record("secretKeyRef", secretKeyRef=SECRET_KEY))
CONTAINER = record(
    "name image resources",
    name=NAME,
    image=TEXT,
    env=many(ENVIRONMENT),
    ports=many(record("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535}, name=NAME)),
    resources=record("requests limits", requests=mapping(QUANTITY), limits=mapping(QUANTITY)),
    volumeMounts=many(record("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME: Schema = {
    **record(
        "name",
        name=NAME,
        persistentVolumeClaim=record("claimName", claimName=NAME, readOnly=FLAG),
        emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    ),
    "minProperties": 2,
    "maxProperties": 2,  # the name and one source
}
TOLERATION = record(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = record(
    "containers",
    containers=many(CONTAINER),
    volumes=many(VOLUME),
    tolerations=many(TOLERATION),
    securityContext=record(runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT, runAsNonRoot=FLAG),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
)
TEMPLATE = record("spec", metadata=record(labels=mapping(TEXT), annotations=mapping(TEXT)), spec=POD)
START_PARAMETERS = mapping(TEXT)  # numbers too are given as strings
RAY_CLUSTER = record(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    authOptions=record("mode", mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=record(
        "rayStartParams template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=START_PARAMETERS,
        template=TEMPLATE,
    ),
    workerGroupSpecs=many(
        record(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=START_PARAMETERS,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = record(
    "entrypoint rayClusterSpec",  # either could be left out where another Ray cluster is selected; here neither may
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=TEMPLATE,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=RAY_CLUSTER,
)
RAY_SERVICE = record(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=TEXT,
    rayClusterConfig=RAY_CLUSTER,
)
SPECS = {"RayJob": RAY_JOB, "RayService": RAY_SERVICE}
APPLICATION = record(
    "name import_path",
    name=TEXT,
    import_path={"type": "string", "pattern": r"^[\w.]+:\w+$"},
    route_prefix={"type": "string", "pattern": "^/"},
    runtime_env={"type": "object"},
    args={"type": "object"},
    deployments={"type": "array"},
)
SERVE = record("applications", applications=many(APPLICATION))


def problems(text: str) -> list[str]:
    """What KubeRay, Kubernetes or Serve would refuse in a manifest, one line each; none for a good one."""
    try:
        manifest = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"not YAML: {' '.join(str(error).split())}"]
    spec = SPECS.get(manifest.get("kind"))
    if spec is None:
        return [f"kind: {manifest.get('kind')} is neither RayJob nor RayService"]
    whole = record(
        "apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=METADATA, spec=spec
    )
    found = _errors(manifest, whole)
    if not found and manifest["kind"] == "RayService":
        found = _errors(yaml.safe_load(manifest["spec"]["serveConfigV2"]), SERVE)
    return found


def _errors(value: Any, schema: Schema) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
