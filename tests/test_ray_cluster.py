import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
import ray
from listening import listening

from app.errors import UserError
from app.ray_cluster import _check_answers, _check_resources, dashboard_url, trainers_know_their_cluster


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
def test_a_run_asks_its_own_cluster_though_another_was_started_later(ray_cluster: None, monkeypatch, tmp_path) -> None:
    from ray._private.services import canonicalize_bootstrap_address
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    before, own = os.environ.get("RAY_ADDRESS"), ray.get_runtime_context().gcs_address
    assert canonicalize_bootstrap_address(None).endswith(":1"), "what `ray start` made last"
    with trainers_know_their_cluster():
        assert canonicalize_bootstrap_address(None) == own
        assert get_env_vars_to_propagate()["RAY_ADDRESS"] == own
    assert os.environ.get("RAY_ADDRESS") == before


@pytest.mark.ray
def test_a_job_that_the_cluster_cannot_hold_is_refused(ray_cluster: None) -> None:
    with pytest.raises(UserError, match="has 0 GPUs and the job needs 2; lower workers.count or workers.gpus"):
        _check_resources(None, {"GPU": 2})
    with pytest.raises(UserError, match="cluster at h:1 has .* CPUs and the job needs 1000"):
        _check_resources("h:1", {"CPU": 1000})


@pytest.mark.ray
def test_nothing_of_a_local_cluster_is_to_be_reached_from_other_machines(ray_cluster: None) -> None:
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    names = {process.name() for process in ours if listening(process)}
    assert {"gcs_server", "raylet"} <= names, names
    for process in ours:
        for address in listening(process):
            assert address.is_loopback, f"{process.name()} listens on {address}"


@pytest.mark.ray
def test_a_local_cluster_asks_for_the_token(ray_cluster: None) -> None:
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with pytest.raises(urllib.error.HTTPError) as dashboard:
        urllib.request.urlopen(f"{dashboard_url()}/api/jobs/", timeout=10)
    assert dashboard.value.code == 401
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as gcs:
                NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=10, metadata=metadata)
            assert gcs.value.code() == grpc.StatusCode.UNAUTHENTICATED
