import pytest

from app.errors import UserError
from app.ray_cluster import _check_answers, _check_resources


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_of_another_kind_is_told(address: str) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT"):
        _check_answers(address)


@pytest.mark.ray
def test_a_job_that_the_cluster_cannot_hold_is_refused(ray_cluster: None) -> None:
    with pytest.raises(UserError, match="has 0 GPUs and the job needs 2; lower workers.count or workers.gpus"):
        _check_resources(None, {"GPU": 2})
    with pytest.raises(UserError, match="cluster at h:1 has .* CPUs and the job needs 1000"):
        _check_resources("h:1", {"CPU": 1000})
