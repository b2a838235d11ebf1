"""What KubeRay 1.6 takes in RayCluster, RayJob and RayService, as a JSON schema.

Its field names are those of KubeRay's reference of its custom resources (Apache-2.0). Kubernetes' own types within them
(pods, their parts) are not repeated here: `pods_of` yields them, for Kubernetes' schema.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema

Schema = dict[str, Any]


def _closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


TEXT: Schema = {"type": "string"}
TRUTH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
LIST: Schema = {"type": "array"}
KUBERNETES: Schema = {"type": "object"}
"""A type of Kubernetes' own."""

RAY_START_PARAMS = TEXTS
_GROUP = {
    "rayStartParams": RAY_START_PARAMS,
    "template": KUBERNETES,
    "resources": TEXTS,
    "labels": TEXTS,
}
HEAD = _closed(
    ("template",),
    **_GROUP,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService=KUBERNETES,
    enableIngress=TRUTH,
)
WORKERS = _closed(
    ("groupName", "template", "minReplicas", "maxReplicas"),
    **_GROUP,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    suspend=TRUTH,
    scaleStrategy=_closed(workersToDelete=LIST),
)
_CREDENTIAL = _closed(value=TEXT, valueFrom=KUBERNETES)
CLUSTER = _closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    suspend=TRUTH,
    managedBy=TEXT,
    upgradeStrategy=_closed(type={"enum": ["Recreate", "None"]}),
    authOptions=_closed(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=TRUTH),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=_closed(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        image=TEXT,
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        resources=KUBERNETES,
        securityContext=KUBERNETES,
        env=LIST,
        envFrom=LIST,
        volumeMounts=LIST,
    ),
    gcsFaultToleranceOptions=_closed(
        ("redisAddress",),
        redisAddress=TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=TEXT,
    ),
    headServiceAnnotations=TEXTS,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = _closed(
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=KUBERNETES,
    submitterConfig=_closed(backoffLimit=COUNT),
    clusterSelector=TEXTS,
    rayClusterSpec=CLUSTER,
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    deletionStrategy={"type": "object"},
    managedBy=TEXT,
    suspend=TRUTH,
)
SERVICE = _closed(
    ("rayClusterConfig",),
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    serveService=KUBERNETES,
    excludeHeadPodFromServeSvc=TRUTH,
    upgradeStrategy={"type": "object"},
    rayClusterDeletionDelaySeconds=COUNT,
    suspend=TRUTH,
)
_SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}
_CLUSTER_OF = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def check(resource: dict[str, Any]) -> None:
    """Raises `jsonschema.ValidationError` for what KubeRay's custom resource does not have."""
    schema = _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"enum": list(_SPECS)},
        metadata=_closed(("name",), name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=_SPECS.get(resource.get("kind", ""), {}),
    )
    jsonschema.Draft7Validator(schema).validate(resource)


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    return spec[_CLUSTER_OF[resource["kind"]]] if resource["kind"] in _CLUSTER_OF else spec


def groups_of(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of nodes by name; the head's is `head`."""
    cluster = cluster_of(resource)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods_of(resource: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each group's pod with the group's name, as Kubernetes knows pods."""
    for name, group in groups_of(resource).items():
        metadata = {"name": name} | group["template"].get("metadata", {})
        yield name, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}
