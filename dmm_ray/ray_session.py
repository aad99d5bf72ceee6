"""Connecting to Ray: an existing cluster, or a local one with little output."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar, cast

from dmm_ray.errors import UserError
from dmm_ray.precision import has_fast_bfloat16

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",  # deduplication would delay messages until after the last line on stdout
    "GOMP_SPINCOUNT": "10000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # it would start a process per CPU, most of which are never used
}
OBJECT_STORE_BYTES = 512 << 20
ANSWER_S = 12.0
"""Time limit for a cluster to answer before it is considered gone; Ray itself keeps retrying for minutes."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


def quiet() -> None:
    """Set Ray's environment variables for little output, except those already set. Call before Ray is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def cluster_address() -> str | None:
    """The cluster that ``RAY_ADDRESS`` names; None if Ray is to run on this machine only."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def ensure_ray(num_cpus: int | None = None) -> None:
    """Connect to Ray unless this process is connected already.

    Inside a Ray job, or with ``RAY_ADDRESS`` set, that cluster is used; otherwise a local one is started with
    ``num_cpus`` CPUs (default: this machine's), which ends with this process. This process's SIGTERM handler is kept.

    Raises:
        UserError: no cluster answers at that address, or Ray cannot start on this machine.
    """
    quiet()
    import ray

    if ray.is_initialized():
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    address = cluster_address()
    if address is not None:
        check_cluster(address)
    # At every start this logger reports that a local cluster uses token authentication, which is expected.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        if address is not None:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=True,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        raise UserError(_why(e, address)) from e
    if callable(on_terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init installs its own


def check_cluster(address: str) -> None:
    """Check that a cluster answers, from a separate process that can be killed.

    Raises:
        UserError: no cluster answers within ``ANSWER_S`` seconds, or it refuses the connection.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return  # this process is that cluster's own job
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS: {address} is for `ray job submit`; set it to the head's host:port (6379 by default), or "
            "submit this command as a job"
        )
    remedy = "start it, or unset RAY_ADDRESS to use this machine"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        # A plain connection fails at once, with the reason, if nothing listens there.
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        except OSError as e:
            raise UserError(f"RAY_ADDRESS: no Ray cluster at {address} ({e}); {remedy}") from e
    code = "import ray; ray.init(logging_level='ERROR', log_to_driver=False, configure_logging=False)"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} within {ANSWER_S:g} s; {remedy}"
        ) from e
    if asked.returncode:
        said = [line.strip() for line in asked.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"RAY_ADDRESS: no Ray cluster can be used at {address} ({said[-1][:300]}); {remedy}")


def _why(error: Exception, address: str | None) -> str:
    """One line that explains why Ray did not start."""
    reason = " ".join(str(error).split())[:300]
    if address is not None:
        return f"RAY_ADDRESS: {address}: {reason}"
    if "AF_UNIX path" in reason:
        name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(n)), "RAY_TMPDIR")
        return f"{name}: too long a path for the sockets that Ray makes in it; set RAY_TMPDIR to a short one, e.g. /tmp"
    return f"Ray cannot start on this machine: {reason}"


class _RayMessages:
    """Replacement for stdout: messages printed by Ray's listener thread are logged, other output passes through."""

    def __init__(self, stdout: TextIO) -> None:
        self.stdout = stdout

    def write(self, text: str) -> int:
        """Log a message from Ray: a lost process in one line, everything in full at level DEBUG."""
        if threading.current_thread().name != "ray_listen_error_messages":
            return self.stdout.write(text)
        if "worker died" in text:
            logger.warning("a worker process died; its work is started again")
        if text.strip():
            logger.debug("%s", text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout, name)


@contextlib.contextmanager
def ray_messages_logged() -> Iterator[None]:
    """Within the block, log Ray's lengthy messages about failed processes instead of printing them to stdout."""
    with contextlib.redirect_stdout(cast(TextIO, _RayMessages(sys.stdout))):
        yield


def call_on_workers(
    workers: int, function: Callable[..., T], *arguments: object, cpus: float, gpus: float
) -> list[T]:
    """Call ``function`` on the cluster in ``workers`` parallel processes, each with the resources of a worker.

    Raises:
        Exception: the first exception that one of them raises.
    """
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(function)
    try:
        return ray.get([task.remote(*arguments) for _ in range(workers)])
    except RayTaskError as e:
        raise e.cause from e


def workers_have_fast_bfloat16(cpus: float, gpus: float) -> bool:
    """:func:`~dmm_ray.precision.has_fast_bfloat16` of the machines that will do the work.

    Args:
        cpus: CPUs per worker.
        gpus: GPUs per worker; if not 0, the GPU is queried instead of the CPU.
    """
    device = "cuda" if gpus else "cpu"
    if cluster_address() is None:  # workers run on this machine
        return has_fast_bfloat16(device)
    [fast] = call_on_workers(1, has_fast_bfloat16, device, cpus=cpus, gpus=gpus)
    return fast
