"""The application as `serve deploy` deploys it from the head, with a proxy and an ingress on every worker."""

import time
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from tests.chaos.cluster import SERVE_PORT, Cluster, wait_for
from tests.chaos.hosts import REPOSITORY
from tests.chaos.traffic import Request

DEPLOY_WITHIN_S = 300.0
_NOTHING: Mapping[str, Any] = {}
REPLICAS = {"ingress": 3, "generator": 2, "retriever": 1}


class Endpoint:
    """Up within the block. Answers go through the workers' proxies: with the head there is one gateway fewer."""

    def __init__(
        self, cluster: Cluster, model: Path, *, deltas: Mapping[str, str], documents: Path | None = None,
        tracking: str = "none", generator: Mapping[str, Any] = _NOTHING, cache: Mapping[str, Any] = _NOTHING,
    ) -> None:  # fmt: skip
        self._cluster = cluster
        values = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
        values["proxy_location"] = "EveryNode"
        values["http_options"] = {"host": "0.0.0.0", "port": SERVE_PORT}
        (application,) = values["applications"]
        application["args"] |= {
            "generator": {
                "model": str(model), "deltas": dict(deltas), "precision": "fp32", "threads": 1, "max_batch_size": 16,
                "refresh_s": 0.5, **({"tracking": {"uri": tracking}} if tracking != "none" else {}), **generator,
            },
            "retriever": {"documents": str(documents)} if documents else {},
            "cache": {"backend": {"type": "redis", "url": cluster.cache_redis}, **cache},
            "request_timeout_s": 60,
        }  # fmt: skip
        for deployment in application["deployments"]:
            number = REPLICAS[deployment["name"]]
            deployment["autoscaling_config"] |= {"min_replicas": number, "max_replicas": number}
            deployment["max_replicas_per_node"] = 1
        self._values = values

    @property
    def addresses(self) -> list[str]:
        return [worker.address for worker in self._cluster.workers]

    @property
    def urls(self) -> list[str]:
        return [f"http://{address}:{SERVE_PORT}" for address in self.addresses]

    def __enter__(self) -> Self:
        file = self._cluster.shared / "serve.yaml"
        file.write_text(yaml.safe_dump(self._values))
        self._cluster.on_head("serve", "deploy", file)
        self.wait_until_whole(within_s=DEPLOY_WITHIN_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.mend()
        self._cluster.on_head("serve", "shutdown", "--yes")
        wait_for(lambda: not self._cluster.asked("/api/serve/applications/")["applications"], what="its end")

    def replicas(self, deployment: str) -> list[str]:
        """The addresses of the nodes where the running ones are."""
        application = self._cluster.asked("/api/serve/applications/")["applications"].get("pacos", {})
        found = application.get("deployments", {}).get(deployment, {}).get("replicas", [])
        return [replica["node_ip"] for replica in found if replica["state"] == "RUNNING"]

    def place(self, deployment: str) -> str:
        return self.replicas(deployment)[0]

    def wait_until_whole(self, *, within_s: float = DEPLOY_WITHIN_S) -> float:
        """Every replica runs on a node that is there, and every worker's proxy answers; the seconds that it took."""
        began = time.monotonic()
        alive = set(self._cluster.nodes())
        try:
            for name, number in REPLICAS.items():
                wait_for(
                    partial(self._runs, name, number, alive), what=f"{number} replicas of {name}", within_s=within_s
                )
            for url in self.urls:
                wait_for(partial(answers, url), what=url, within_s=within_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self._cluster.on_head('serve', 'status')}") from None
        return time.monotonic() - began

    def _runs(self, deployment: str, number: int, alive: Container[str]) -> bool:
        return sum(address in alive for address in self.replicas(deployment)) == number


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def completion(model: str, **more: Any) -> Callable[[int], Request]:
    """Requests that no cache knows and that take some time."""

    def request(number: int) -> Request:
        asked = {"model": model, "prompt": f"An adult alpaca {number}", "max_tokens": 60, "temperature": 0}
        return Request(asked | more)

    return request
