"""Connecting to Ray: a cluster that is there, or a quiet local one."""

from __future__ import annotations

import logging
import os
import signal
import threading

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "GOMP_SPINCOUNT": "10000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
OBJECT_STORE_BYTES = 512 << 20


def quiet() -> None:
    """Set Ray's environment for calm output; what the user has set stays. Call before Ray is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def ensure_ray(num_cpus: int | None = None) -> None:
    """Connect to Ray unless this process already is.

    Inside a Ray job, or with ``RAY_ADDRESS`` set, that cluster is used; otherwise a local one is started with
    ``num_cpus`` CPUs (default: this machine's). It ends with this process. A SIGTERM handler of ours stays.
    """
    quiet()
    import ray

    if ray.is_initialized():
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
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
    if callable(on_terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init puts its own in place
