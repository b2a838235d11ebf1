"""Connecting to Ray: a running cluster by address, else a local one that ends with the process.

Logic elsewhere assumes that Ray is initialised; only entry points call this.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from app.config.schema import WorkerResources
from app.errors import UserError

ANSWER_WITHIN_S = 8.0
TOKEN_FILE = Path.home() / ".ray" / "auth_token"
_HAVE_TOKEN = "export RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
LOCALHOST = "127.0.0.1"
TAKES_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable, on every system: whether a node may be one of several."""


@contextmanager
def connected(address: str | None, *, min_cpus: float = 1, min_gpus: float = 0) -> Iterator[bool]:
    """Ray, initialised for the block; yields whether the cluster is our own and ends with it.

    Without `address`, the cluster that `ray job submit` set in RAY_ADDRESS, else a local one with at least
    `min_cpus` logical CPUs: on a small machine, waiting workers must not starve the data that they wait for.

    Raises:
        UserError: nothing answers at the address within ten seconds, or the cluster has fewer CPUs or GPUs.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    try:
        _connect(address, min_cpus)
        _check_resources(address, {"CPU": min_cpus, "GPU": min_gpus})
        _configure_data()
        yield not address
    finally:
        ray.shutdown()


@contextmanager
def trainers_know_their_cluster() -> Iterator[None]:
    """For the block, the processes that Ray Train starts have the address of the cluster that they are in.

    Its cleaner asks Ray's state API whether the run is alive, and that asks the cluster of RAY_ADDRESS, else the one
    that `ray start` made last on the machine: where that has gone, a run's end waits a minute for it, and where
    another one is up, that says of a run which it does not know that it is dead.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def on_all_cpus(dataset: Any) -> Any:
    """`dataset`, whose tasks return little, free to use every CPU at once.

    Ray Data holds CPUs back so that a pipeline's operators cannot starve each other: on two cores a single map then
    runs one task at a time, at half the speed. What is given up with it is the limit on results in memory.
    """
    dataset.context.op_resource_reservation_enabled = False
    return dataset


def _connect(address: str | None, min_cpus: float) -> None:
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "5")  # of a local cluster; below it Ray complains
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
    if address:
        _check_answers(address)
    import ray

    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        if address:
            with _localhost_as_it_is() if address.startswith(f"{LOCALHOST}:") else nullcontext():
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            return
        # A process for each run, which watches for nodes that a cloud takes back: of this machine none does.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        with _localhost_as_it_is():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(min_cpus)),
                include_dashboard=True,
                dashboard_host=LOCALHOST,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        keep_token_private()
    except ray.exceptions.AuthenticationError:
        raise UserError(f"address={address!r}: the cluster wants a token; {_HAVE_TOKEN}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address:
            raise
        remedy = "start one with `ray start --head`"
        if os.environ.get("RAY_AUTH_MODE") != "token":  # Ray 2.60 does not tell a missing token from a missing cluster
            remedy += f", or, if one is there and wants a token, {_HAVE_TOKEN}"
        raise UserError(f"address={address!r}: {_first_line(error)}; {remedy}") from None


def keep_token_private() -> None:
    """Ray writes its token as the umask has it, for most users readable to all of the machine; whoever reads it can run
    what they like as this user."""
    with suppress(OSError):  # none is there, or it is not ours
        TOKEN_FILE.chmod(0o600)


@contextmanager
def _localhost_as_it_is() -> Iterator[None]:
    """For the block, and in the processes that are started in it, Ray takes 127.0.0.1 for an address like others.

    Else it puts the one in its place by which other machines reach this one, and where that is a node's, the node's
    processes listen on all interfaces (Ray 2.60). Ray does without only where it takes no nodes of other machines.
    """
    from ray._private import ray_constants

    is_taking_nodes, before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(TAKES_NODES)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[TAKES_NODES] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = is_taking_nodes
        os.environ.pop(TAKES_NODES)
        if before is not None:
            os.environ[TAKES_NODES] = before


BESIDE_OTHERS = {"GOMP_SPINCOUNT": "1000"}
"""Environment of a process whose cores others may use as well. By default threads of OpenMP spin while they wait for
each other, and so take the time of the one that they wait for: beside one busy process, on two cores, a training step
took five times as long, a token 13 times. It is what GNU's OpenMP does itself where it has more threads than cores."""


def thread_environment(workers: WorkerResources) -> dict[str, str]:
    """Environment variables that keep a worker process to its share of threads."""
    return BESIDE_OTHERS | {"OMP_NUM_THREADS": str(workers.threads), "TOKENIZERS_PARALLELISM": "false"}


def dashboard_url() -> str | None:
    """Where the dashboard of the connected cluster answers."""
    import ray

    url = ray._private.worker.global_worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def _check_answers(address: str) -> None:
    """Fail fast where no GCS answers at `address`; `ray.init` would retry for minutes."""
    if "://" in address:
        raise UserError(
            f"address={address!r} is not HOST:PORT; give the port of the cluster's GCS, as in HOST:6379 (a dashboard's "
            "http:// address is for `ray job submit`, in RAY_API_SERVER_ADDRESS)"
        )
    if address in ("auto", "local"):  # Ray looks them up itself, at once
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"address={address!r} is not HOST:PORT")
    if os.environ.get("RAY_USE_TLS") == "1":  # a plain channel cannot tell here
        return
    import grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with grpc.insecure_channel(address) as channel:
        try:
            stub = NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(CheckAliveRequest(), timeout=ANSWER_WITHIN_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # a GCS, which wants a token; `ray.init` brings it
                return
            reason = "does not answer" if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else "is not a Ray cluster"
            raise UserError(
                f"address={address!r} {reason} ({ANSWER_WITHIN_S:.0f} s); is the cluster up, and the port its GCS's "
                "(6379 unless set)?"
            ) from None


def _check_resources(address: str | None, needed: dict[str, float]) -> None:
    """A job that waits for what the cluster does not have would wait for ever."""
    import ray

    present = ray.cluster_resources()
    for kind, amount in needed.items():
        if present.get(kind, 0) < amount:
            raise UserError(
                f"{f'the cluster at {address}' if address else 'this machine'} has {present.get(kind, 0):g} {kind}s "
                f"and the job needs {amount:g}; lower workers.count or workers.{kind.lower()}s"
                + (", which may be a fraction" if kind == "CPU" else "")
            )


def _configure_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    # Ray 2.60's new reader starts worker processes of its own at every epoch: 5 s instead of 0.3 s on two cores.
    context.use_datasource_v2 = False
    # Leave the terminal to our own progress display; Ray's is in the dashboard and its logs.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
