"""What KubeRay 1.6 takes in RayCluster, RayJob and RayService: a JSON schema, and what its operator refuses beyond one.

Written by hand: field names, required fields and choices are those of the Go types that KubeRay's resource definitions
are generated from, and never more than those; the definitions themselves (0.8 MB each, nearly all of it pods) are not
here. Kubernetes' own types within them (pods, their parts) are not repeated: `pods_of` yields them, for Kubernetes'
schema.
"""

import re
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
MANAGER: Schema = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}
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
    managedBy=MANAGER,
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
    managedBy=MANAGER,
    suspend=TRUTH,
)
SERVICE = _closed(
    ("rayClusterConfig",),
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    serveService=KUBERNETES,
    excludeHeadPodFromServeSvc=TRUTH,
    upgradeStrategy=_closed(type={"enum": ["NewCluster", "None"]}),
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


LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}  # services are named after them, with an ending
FIRST_RAY_WITH_TOKENS = (2, 52)


def refusals(resource: dict[str, Any]) -> list[str]:
    """What the operator has against a resource that the schema lets pass; it is created then, and nothing comes of it.

    After `ray-operator/controllers/ray/utils/validation.go`, as far as the schema leaves anything to it.
    """
    kind, name, spec, cluster = resource["kind"], resource["metadata"]["name"], resource["spec"], cluster_of(resource)
    groups = groups_of(resource)
    head, (head_container, *_) = groups["head"], groups["head"]["template"]["spec"]["containers"]
    environment = {variable["name"] for variable in head_container.get("env", ())}
    found = []
    if len(name) > LONGEST_NAME[kind] or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append("name")
    for group in groups.values():
        if group.get("resources") and group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            found.append("resources twice")
        if "labels" in group["rayStartParams"]:
            found.append("labels as a parameter")
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            found.append("more nodes at least than at most")
        if group.get("suspend"):
            found.append("a suspended group")
    if environment & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        found.append("Redis in the environment")
    if head["rayStartParams"].keys() & {"redis-password", "redis-username"}:
        found.append("Redis as a parameter")
    if resource["metadata"].get("annotations", {}).keys() & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
        found.append("Redis in an annotation")
    if "RAY_enable_autoscaler_v2" in environment:
        found.append("the autoscaler in the environment")
    if any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups.values()):
        found.append("restartPolicy, which the second autoscaler does not have")
    authentication = cluster.get("authOptions", {})
    if authentication.get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)\.", cluster.get("rayVersion", ""))
        if not version or (int(version[1]), int(version[2])) < FIRST_RAY_WITH_TOKENS:
            found.append("a Ray without tokens")
    if authentication.get("enableK8sTokenAuth") and (kind != "RayCluster" or "secretName" in authentication):
        found.append("Kubernetes' tokens")
    if kind != "RayCluster" and "upgradeStrategy" in cluster:
        found.append("a cluster's upgradeStrategy")
    if kind == "RayService" and head.get("headService", {}).get("metadata", {}).get("name"):
        found.append("a name for the head's service")
    if kind == "RayJob":
        if not spec.get("shutdownAfterJobFinishes") and (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")):
            found.append("a cluster that stays after its job, yet is suspended or has a time to live")
        if spec.get("activeDeadlineSeconds") == 0:
            found.append("a deadline of 0 s")
    return found


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
