"""`dmm serve`: the endpoint on this machine or cluster, until interrupted."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.failures import cause_of, keep_trace, last_error
from dmm_ray.ray_session import cluster_address, ensure_ray, ray_messages_logged
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.http.auth import settled

logger = logging.getLogger(__name__)
APPLICATION = "dmm"
READY_DEADLINE_S = 60.0
POLL_S = 0.1
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # answers can exceed the default of 4 MiB
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # the default of 30 s is for external load balancers
}
"""Environment variables that Serve reads on import, here and in the processes that it starts."""


def serve(config: ServeConfig) -> str:
    """Serve until interrupted, then finish running requests. Returns the default prior's folder.

    Raises:
        UserError: a folder contains no prior, or the port is taken.
        CheckFailed: the application did not start.
    """
    with running(config) as url:
        logger.info("ready: %s (documentation at %s/docs); press Ctrl-C to stop", url, url)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        logger.info("stopping")
    return next(iter(config.priors.values()))


@contextlib.contextmanager
def running(config: ServeConfig) -> Iterator[str]:
    """Context in which the endpoint runs; yields its base URL once it is ready.

    Raises:
        UserError: a folder contains no prior, the port is taken, this cluster already runs Serve, the address is
            reachable from other machines and no tokens are given, or HAProxy is requested on a running cluster.
        CheckFailed: the application did not start.
    """
    config = settled(config)
    for source in config.priors.values():
        _check_prior(source)
    port = _free_port(config.host, config.port)
    # Imported here: it takes seconds, and the command line's help does not need it.
    import ray

    if config.proxy == "haproxy":
        _use_haproxy(late=ray.is_initialized())
    from ray import serve as ray_serve

    owned = not ray.is_initialized()
    ensure_ray()
    status = ray_serve.status()
    if status.proxies or status.applications:
        raise UserError(
            "host, port: this cluster already runs Serve; use `serve deploy`, or stop it with `serve shutdown`"
        )
    url = f"http://{_reachable(config.host)}:{port}"
    with ray_messages_logged():
        try:
            _deploy(config, port)
            wait_ready(url)
            yield url
        finally:
            if APPLICATION in ray_serve.status().applications:
                ray_serve.delete(APPLICATION)  # lets running requests finish, unlike a shutdown alone
            ray_serve.shutdown()
            if owned:
                ray.shutdown()


def _use_haproxy(late: bool) -> None:
    """Make the next Serve instance use HAProxy. Raises UserError if a cluster is running or Serve was imported."""
    if late or cluster_address() or "ray.serve" in sys.modules:
        settings = " ".join(f"{name}={value}" for name, value in HAPROXY.items())
        raise UserError(
            f"proxy: haproxy cannot be enabled on a running cluster; start every node with {settings}"
        )
    os.environ.update(HAPROXY)


def _deploy(config: ServeConfig, port: int) -> None:
    """Start Serve and the application; returns when its replicas are up.

    Raises:
        UserError: a replica cannot load its prior or model.
        CheckFailed: a replica failed for another reason.
    """
    from ray import serve as ray_serve

    from dmm_ray.serving.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"enable_access_log": False}  # the application writes its own access log, to Serve's log files
    ray_serve.start(http_options={"host": config.host, "port": port}, logging_config=quiet)
    try:
        ray_serve.run(build(config), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as e:
        found = ray_serve.status().applications[APPLICATION].deployments.values()
        raise _failure([deployment.message for deployment in found], e) from e


def _failure(messages: list[str], error: RuntimeError) -> UserError | CheckFailed:
    """The error to raise when the application did not start.

    Args:
        messages: Serve's status message of each deployment; those of failed replicas contain tracebacks.
        error: the error raised by Serve.
    """
    reasons = [reason for message in messages if (reason := last_error(message))]
    refused = [reason for reason in reasons if reason.startswith("UserError: ")]
    if refused:
        return UserError(refused[0].removeprefix("UserError: "))
    reason = reasons[-1] if reasons else cause_of(error)
    where = keep_trace("serve", "\n\n".join([*messages, str(error)]))
    return CheckFailed(f"the application did not start: {reason}; {where}")


def _check_prior(source: str) -> None:
    """Raises UserError if there is no prior; a folder's weights are only checked by the replicas that load them."""
    from dmm_ray.prior import folder

    if "://" in source or Path(source).is_dir():
        folder.load_config(source)
    else:
        folder.load(source)


def _free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0. Raises UserError if it is taken, which Serve's proxy would not notice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(
                f"port: cannot listen on {host}:{port} ({e.strerror}); choose another --port or --host"
            ) from e
        return int(s.getsockname()[1])


def _reachable(host: str) -> str:
    """The address at which this machine can reach a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def wait_ready(url: str) -> None:
    """Wait until every part of the endpoint is ready. Raises CheckFailed after a minute."""
    deadline = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/v2/health/ready", timeout=10).status_code == 200:
                return
        time.sleep(POLL_S)
    raise CheckFailed(f"{url} did not become ready in {READY_DEADLINE_S:.0f} s; see Ray's logs for the cause")
