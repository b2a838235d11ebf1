"""`python -m cluster.generate`: one RayCluster and one serve_config.yaml, from which the others follow."""

from cluster.generate import (
    RAY_CLUSTER,
    REPOSITORY,
    SERVE_CONFIG,
    _read,
    manifests,
    on_all_interfaces,
    service,
    train_job,
)


def test_the_committed_files_are_those_that_are_generated() -> None:
    for file, text in manifests().items():
        assert file.read_text() == text, f"{file.relative_to(REPOSITORY)}: run `python -m cluster.generate`"


def test_a_change_of_what_is_served_changes_the_service() -> None:
    cluster, served = _read(RAY_CLUSTER), _read(SERVE_CONFIG)
    before = service(cluster, served)["spec"]["serveConfigV2"]
    served["applications"][0]["args"]["generator"]["model"] = "gpt2"
    assert "model: gpt2" in service(cluster, served)["spec"]["serveConfigV2"] != before


def test_only_the_address_differs_from_what_is_served_on_one_machine() -> None:
    served = _read(SERVE_CONFIG)
    inside = on_all_interfaces(served)
    assert inside["http_options"] == {"host": "0.0.0.0", "port": served["http_options"]["port"]}
    assert inside | {"http_options": served["http_options"]} == served
    assert served["http_options"]["host"] == "127.0.0.1"


def test_clusters_of_jobs_leave_the_one_that_stays_as_it_is() -> None:
    cluster = _read(RAY_CLUSTER)
    train_job(cluster), service(cluster, _read(SERVE_CONFIG))
    assert cluster == _read(RAY_CLUSTER)
