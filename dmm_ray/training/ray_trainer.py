"""A run on Ray Train: its workers, the resources they need, and how they are told to stop."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.failures import Failure, WorkerError, keep_trace
from dmm_ray.files import exists, filesystem, join, read_json, remove_folder, write_json
from dmm_ray.prior.config import PriorConfig
from dmm_ray.ray_session import cluster_address, ensure_ray, ray_messages_logged
from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loop import Trainer
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.signals import InterruptHandler, RaySignals

logger = logging.getLogger(__name__)
RAY_FOLDER, REFUSAL, STOP, STARTED, DONE = ".ray", "refused.json", "stop.json", "started.json", "done.json"
STOP_S = 60
"""Time that workers have to save and exit."""
WAIT_S = 30.0
"""Seconds between warnings about workers that have not started."""
LET_GO_S = 4.0
"""How long finished actors may still hold their resources: Ray releases them with a delay."""
MEMORY_OPTIONS = "--micro-batch"
LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|DistBackendError|NCCL", re.IGNORECASE)
"""Matches what workers raise because another one has failed."""


def train_on_ray(
    config: TrainConfig, prior_config: PriorConfig, check: Callable[[], None]
) -> dict[str, float]:
    """Run the workers and stop them when this process is interrupted; returns the resources of each worker.

    Args:
        config: the run's configuration.
        prior_config: configuration of the prior to train.
        check: called periodically; raises if the folder has been taken over.

    Raises:
        UserError: more than the cluster has, or an input error raised by a worker.
        CheckFailed: workers failed for another reason, or more often than allowed.
        KeyboardInterrupt: the run was interrupted.
    """
    ensure_ray()
    if (samples := checkpoint.newest(config.out)) is not None:  # the workers' own log does not reach the user
        logger.info("resuming after %d samples", samples)
    clear(config.out)
    needs = worker_needs(config)
    warn_of_waiting(config, needs)
    trainer = _trainer(config, prior_config, needs)
    with InterruptHandler() as interrupt, ray_messages_logged():
        fit = _Fit(trainer)
        waiting = Waiting(config.out, needs)
        while fit.is_alive() and not interrupt.noted:
            fit.join(0.2)
            waiting.look()
            check()
        if fit.is_alive():
            write_json(_path(config.out, STOP), {})
            fit.join(STOP_S)
        if fit.is_alive():
            logger.warning("the workers did not stop within %d s; the last checkpoint is kept", STOP_S)
            raise KeyboardInterrupt
    _raise_refusal(config.out)
    finished = exists(_path(config.out, DONE))
    clear(config.out)
    if not finished and interrupt.noted:
        raise KeyboardInterrupt
    if not finished:
        raise CheckFailed(_failure(config, fit.error)) from fit.error
    return needs


def _failure(config: TrainConfig, error: Exception) -> str:
    """One line on why training failed: the rank at fault and its error, whose traceback is kept in a file."""
    failures = sorted(
        (
            (rank, Failure.of(_cause(e), MEMORY_OPTIONS))
            for rank, e in getattr(error, "worker_failures", {}).items()
        ),
        key=lambda found: (LOST_PEER.search(found[1].cause) is not None, found[0]),
    )
    restarts = (
        f" after {config.distribution.max_failures} restarts" if config.distribution.max_failures else ""
    )
    if failures:
        rank, failure = failures[0]
        where = keep_trace(f"rank-{rank}", failure.trace, config.out)
        return f"training failed{restarts}: rank {rank}: {failure.cause}; {where}"
    failure = Failure.of(_cause(error), MEMORY_OPTIONS)
    return f"training failed: {failure.cause}; {keep_trace('training', failure.trace, config.out)}"


def _cause(error: Exception) -> Exception:
    """The cause inside Ray Train's own exceptions."""
    for name in ("health_check_failure", "controller_failure"):
        error = getattr(error, name, error)
    return error


def _free(wanted: dict[str, float]) -> dict[str, float]:
    """The cluster's free resources, after giving work that has just ended a few seconds to release those wanted."""
    import ray

    deadline = time.monotonic() + LET_GO_S
    while True:
        free = ray.available_resources()
        if time.monotonic() > deadline or all(n <= free.get(kind, 0) for kind, n in wanted.items()):
            return free
        time.sleep(LET_GO_S / 20)


def worker_needs(config: TrainConfig) -> dict[str, float]:
    """The resources of one worker on the cluster that this process is connected to.

    Raises:
        UserError: the cluster has too little for the minimum number of workers.
    """
    asked = config.distribution
    import ray

    has = ray.cluster_resources()
    fewest = asked.min_workers or asked.workers
    use_gpu = asked.device == "cuda" or (asked.device == "auto" and has.get("GPU", 0) >= fewest)
    cpus = asked.cpus_per_worker or (1 if use_gpu else max(1, math.floor(has.get("CPU", 1) / asked.workers)))
    needs = {"CPU": cpus} | ({"GPU": 1.0} if use_gpu else {})
    for kind, each in needs.items():
        if each * fewest > has.get(kind, 0):
            raise UserError(
                f"workers: {fewest} x {each:g} {kind} is more than the cluster's {has.get(kind, 0):g}; "
                f"lower --workers{' or --cpus-per-worker' if kind == 'CPU' else ''}"
            )
    return needs


def warn_of_waiting(config: TrainConfig, needs: dict[str, float]) -> None:
    """Warn if the workers must wait for resources or leave no CPU to others."""
    asked = config.distribution
    import ray

    has, fewest = ray.cluster_resources(), asked.min_workers or asked.workers
    free = _free({kind: each * fewest for kind, each in needs.items()})
    for kind, each in needs.items():
        if each * fewest > free.get(kind, 0):
            logger.warning(
                "workers: %d x %g %s needed, but only %g of the cluster's %g are free: the run waits for the rest",
                fewest, each, kind, free.get(kind, 0), has[kind],
            )  # fmt: skip
    if cluster_address() is not None and needs["CPU"] * asked.workers >= has["CPU"]:
        logger.warning(
            "workers: they take all %g CPUs of the cluster; other Ray Data jobs will wait (see --cpus-per-worker)",
            has["CPU"],
        )


class _Fit(threading.Thread):
    """``trainer.fit()`` in a thread: in the main thread it would handle Ctrl-C itself and exit this process."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True, name="dmm-fit")
        self.trainer, self.error = trainer, Exception("the trainer ended without a result")
        self.start()

    def run(self) -> None:
        """Fit, and keep the error that the trainer ends with."""
        from ray.exceptions import RayError
        from ray.train.v2.api.exceptions import TrainingFailedError

        try:
            self.trainer.fit()
        except (TrainingFailedError, RayError) as e:
            self.error = e


class Waiting:
    """Warns periodically while no workers have started: Ray retries forever."""

    def __init__(self, out: str, needs: dict[str, float]) -> None:
        self.marker, self.needs = _path(out, STARTED), needs
        self.since = self.said = time.monotonic()

    def look(self) -> None:
        """Warn if there have been no workers for a while."""
        import ray

        now = time.monotonic()
        if now - self.said < WAIT_S:
            return
        self.said = now
        if exists(self.marker):
            self.since = now
            return
        asked = ", ".join(f"{n:g} {kind}" for kind, n in self.needs.items())
        free = ", ".join(f"{ray.available_resources().get(kind, 0):g} {kind}" for kind in self.needs)
        logger.warning(
            "no workers for %.0f s: each needs %s on one node, free in the whole cluster are %s; still waiting",
            now - self.since, asked, free,
        )  # fmt: skip


def _trainer(config: TrainConfig, prior_config: PriorConfig, needs: dict[str, float]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    asked = config.distribution
    elastic = asked.min_workers is not None and asked.min_workers < asked.workers
    return TorchTrainer(
        _worker,
        train_loop_config={"train": config, "prior": prior_config, "threads": max(1, int(needs["CPU"]))},
        scaling_config=ScalingConfig(
            num_workers=(asked.min_workers, asked.workers) if elastic else asked.workers,
            elastic_resize_monitor_interval_s=asked.resize_interval_s,
            use_gpu="GPU" in needs,
            resources_per_worker=needs,
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=config.out,
            failure_config=FailureConfig(max_failures=asked.max_failures),
            callbacks=[_lost_workers(_path(config.out, STARTED))],
        ),
    )


def _lost_workers(marker: str) -> Any:
    """A callback that removes the marker of running workers once one of them has ended with an error."""
    from ray.train import UserCallback

    class LostWorkers(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            fs, path = filesystem(marker)
            if fs.exists(path):
                fs.rm_file(path)

    return LostWorkers()


def clear(out: str) -> None:
    """Delete what a Ray run left: Ray's own state, refusals and stop requests."""
    remove_folder(join(out, RAY_FOLDER))


def _path(out: str, name: str) -> str:
    return join(out, RAY_FOLDER, name)


def _raise_refusal(out: str) -> None:
    """Raise the error that a worker reported as final, as opposed to a crash to retry."""
    path = _path(out, REFUSAL)
    if exists(path):
        refusal = read_json(path)
        clear(out)
        raise (UserError if refusal["bad_input"] else CheckFailed)(refusal["message"])


def _worker(loop_config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    rank_info = RankInfo(context.get_world_rank(), context.get_world_size(), get_device(), on_ray=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    config: TrainConfig = loop_config["train"]
    refusal = _path(config.out, REFUSAL)
    if exists(refusal):
        return
    try:
        if rank_info.rank == 0:
            write_json(_path(config.out, STARTED), {"workers": rank_info.world_size})
        run = Trainer(config, loop_config["prior"], rank_info)
        signals = RaySignals(_path(config.out, STOP), rank_info.rank, rank_info.world_size)
        if run.train(signals) and rank_info.rank == 0:
            write_json(_path(config.out, DONE), {})
    except (UserError, CheckFailed) as e:
        write_json(refusal, {"message": str(e), "bad_input": isinstance(e, UserError)})
        if rank_info.world_size > 1:
            raise  # others may wait for this one: Ray stops them all, and restarted they return at the check above
    except Exception as e:
        raise WorkerError(*Failure.of(e, MEMORY_OPTIONS)) from e
