from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from app.errors import UserError
from app.ray_cluster import _check_answers, _check_resources


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "nonsense", "host:"])
def test_an_address_of_another_kind_is_told(address: str) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT"):
        _check_answers(address)


def test_another_server_than_rays_is_told() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UserError, match="is not a Ray cluster"):
            _check_answers(f"127.0.0.1:{port}")
    finally:
        server.stop(grace=None)


@pytest.mark.ray
def test_a_running_cluster_answers(ray_cluster: None) -> None:
    _check_answers(ray.get_runtime_context().gcs_address)


@pytest.mark.ray
def test_a_job_that_the_cluster_cannot_hold_is_refused(ray_cluster: None) -> None:
    with pytest.raises(UserError, match="has 0 GPUs and the job needs 2; lower workers.count or workers.gpus"):
        _check_resources(None, {"GPU": 2})
    with pytest.raises(UserError, match="cluster at h:1 has .* CPUs and the job needs 1000"):
        _check_resources("h:1", {"CPU": 1000})
