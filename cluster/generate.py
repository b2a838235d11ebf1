"""Writes what follows from other files: `python -m cluster.generate`.

`kubernetes/raycluster.yaml` says what a cluster is, `/serve_config.yaml` what is served. The clusters of the jobs and
of the service are the first with other numbers, and what is served there is the second with the address that containers
need, so that neither is kept twice by hand. `dashboard.py` says what the Grafana dashboard shows, and for Kubernetes
both it and the alerts of `monitoring/alerts.yaml` become resources. A test compares the files with what this makes.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from cluster.dashboard import dashboard_text

REPOSITORY = Path(__file__).parent.parent
RAY_CLUSTER = REPOSITORY / "cluster/kubernetes/raycluster.yaml"
SERVE_CONFIG = REPOSITORY / "serve_config.yaml"
ALERTS = REPOSITORY / "cluster/monitoring/alerts.yaml"
SHARED = "/srv/pacos"
CONFIGS = "/opt/pacos/configs"

Manifest = dict[str, Any]


def manifests() -> dict[Path, str]:
    """Every generated file with its text."""
    cluster, served = _read(RAY_CLUSTER), _read(SERVE_CONFIG)
    folder = REPOSITORY / "cluster"
    kubernetes, docker, monitoring = folder / "kubernetes", folder / "docker", folder / "monitoring"
    from_both = "kubernetes/raycluster.yaml and /serve_config.yaml"
    return {
        kubernetes / "rayjob-train.yaml": _text(train_job(cluster), source="kubernetes/raycluster.yaml"),
        kubernetes / "rayjob-sweep.yaml": _text(sweep_job(cluster), source="kubernetes/raycluster.yaml"),
        kubernetes / "rayservice.yaml": _text(service(cluster, served), source=from_both),
        docker / "serve_config.yaml": _text(on_all_interfaces(served), source="/serve_config.yaml"),
        monitoring / "dashboard.json": dashboard_text(),
        monitoring / "kubernetes.yaml": _text(
            *monitored(cluster, _read(ALERTS)), source="dashboard.py and monitoring/alerts.yaml"
        ),
    }


def train_job(cluster: Manifest) -> Manifest:
    """Two workers with a GPU each. They are there before the job begins: a job does not wait for an autoscaler."""
    entrypoint = (
        f"pacos train --config {CONFIGS}/alpaca-lora.yaml data={SHARED}/data output={SHARED}/train "
        "workers.count=2 workers.gpus=1 workers.cpus=4 workers.threads=4"
    )
    return _job(cluster, name="pacos-train", entrypoint=entrypoint, least={"cpu": 1, "gpu": 2})


def sweep_job(cluster: Manifest) -> Manifest:
    """On CPUs. A sweep counts its room when it starts: more `least` is more trials at once; later ones are idle."""
    entrypoint = (
        f"pacos sweep --config {CONFIGS}/sweeps/lora_rank.yaml output={SHARED}/sweep train.data={SHARED}/data "
        "train.workers.cpus=4 train.workers.threads=4"
    )
    return _job(cluster, name="pacos-sweep", entrypoint=entrypoint, least={"cpu": 2, "gpu": 0})


def service(cluster: Manifest, served: Manifest) -> Manifest:
    """The endpoint, on every worker that has a replica; the head takes no requests."""
    spec = _cluster_spec(cluster, least={"cpu": 2, "gpu": 0})
    for group in spec["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        port = served["http_options"]["port"]
        container["ports"] = [{"name": "serve", "containerPort": port}]
        # A worker gets requests while Serve's proxy on it answers. A new dict: the head has the old one too.
        container["readinessProbe"] = container["readinessProbe"] | {"httpGet": {"path": "/-/healthz", "port": port}}
    config = on_all_interfaces(served) | {"proxy_location": "EveryNode"}
    return _resource(
        cluster,
        kind="RayService",
        name="pacos",
        spec={
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": _dump(config),
            "rayClusterConfig": spec,
        },
    )


def on_all_interfaces(served: Manifest) -> Manifest:
    """`served` for a container, whose own localhost nobody outside reaches. Who does is up to ports and policies."""
    return served | {"http_options": served["http_options"] | {"host": "0.0.0.0"}}


def monitored(cluster: Manifest, alerts: Manifest) -> list[Manifest]:
    """For the Prometheus operator: what it scrapes, and its alerts; for Grafana's sidecar the dashboard."""

    def resource(kind: str, **content: Any) -> Manifest:
        of_core = kind == "ConfigMap"
        metadata: Manifest = {"name": "pacos", "namespace": cluster["metadata"]["namespace"]}
        if of_core:
            metadata["labels"] = {"grafana_dashboard": "1"}
        return {
            "apiVersion": "v1" if of_core else "monitoring.coreos.com/v1", "kind": kind, "metadata": metadata, **content
        }  # fmt: skip

    endpoint = {"port": "metrics", "relabelings": [{"action": "replace", "targetLabel": "job", "replacement": "ray"}]}
    nodes = {"selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}, "podMetricsEndpoints": [endpoint]}
    return [
        resource("PodMonitor", spec=nodes),
        resource("PrometheusRule", spec=alerts),
        resource("ConfigMap", data={"pacos.json": dashboard_text()}),
    ]


def _job(cluster: Manifest, *, name: str, entrypoint: str, least: dict[str, int]) -> Manifest:
    spec = _cluster_spec(cluster, least=least)
    del spec["gcsFaultToleranceOptions"]  # KubeRay starts a job's cluster anew, it does not go on with an old one
    return _resource(
        cluster,
        kind="RayJob",
        name=name,
        spec={
            "entrypoint": entrypoint,
            "submissionMode": "HTTPMode",  # by the operator: no pod of its own, which network.yaml would have to let in
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 0,  # Ray Train replaces lost workers; another try needs --resume
            "rayClusterSpec": spec,
        },
    )


def _cluster_spec(cluster: Manifest, *, least: dict[str, int]) -> Manifest:
    """A copy of the cluster with at least so many workers of each group."""
    spec = copy.deepcopy(cluster["spec"])
    for group in spec["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"] = least[group["groupName"]]
    return spec


def _resource(cluster: Manifest, *, kind: str, name: str, spec: Manifest) -> Manifest:
    metadata = {"name": name, "namespace": cluster["metadata"]["namespace"]}
    return {"apiVersion": cluster["apiVersion"], "kind": kind, "metadata": metadata, "spec": spec}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # every place written out, as a reader of one file expects
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _dump(values: Any) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def _text(*documents: Manifest, source: str) -> str:
    texts = "---\n".join(map(_dump, documents))
    return f"# Generated from {source} by `python -m cluster.generate`; change those.\n{texts}"


def _read(file: Path) -> Manifest:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def main() -> None:
    for file, text in manifests().items():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
