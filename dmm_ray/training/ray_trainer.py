"""A run on Ray Train: its workers, what they need of the cluster, and how they are told to stop."""

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
"""Time that workers have to save and end."""
WAIT_S = 30.0
"""Seconds between words on workers that have not started."""
LET_GO_S = 4.0
"""How long actors that have ended may hold their resources: Ray takes them back by and by."""
MEMORY_OPTIONS = "--micro-batch"
LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|DistBackendError|NCCL", re.IGNORECASE)
"""What workers raise when another one has failed."""


def train_on_ray(
    config: TrainConfig, prior_config: PriorConfig, check: Callable[[], None]
) -> dict[str, float]:
    """Run the workers, and have them stop when this process is told to; the resources that each of them had.

    Args:
        config: of the run.
        prior_config: of the prior to be.
        check: called now and then; raises when the folder has been taken over.

    Raises:
        UserError: more than the cluster has, or what a worker refused.
        CheckFailed: workers failed for another reason, or more often than allowed.
        KeyboardInterrupt: told to stop.
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
    """One line on why training failed: the rank at fault and what it raised; its trace is kept in a file."""
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
    """What Ray Train's own exceptions are about."""
    for name in ("health_check_failure", "controller_failure"):
        error = getattr(error, name, error)
    return error


def _free(wanted: dict[str, float]) -> dict[str, float]:
    """What is free on the cluster: work that has just ended is given some seconds to let go of what is wanted."""
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
        UserError: the cluster has not enough for the fewest workers.
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
                f"workers: {fewest} of {each:g} {kind}s need more than the cluster's {has.get(kind, 0):g}; "
                f"lower --workers{' or --cpus-per-worker' if kind == 'CPU' else ''}"
            )
    return needs


def warn_of_waiting(config: TrainConfig, needs: dict[str, float]) -> None:
    """Say so where the workers have to wait for resources, or leave no CPU to others."""
    asked = config.distribution
    import ray

    has, fewest = ray.cluster_resources(), asked.min_workers or asked.workers
    free = _free({kind: each * fewest for kind, each in needs.items()})
    for kind, each in needs.items():
        if each * fewest > free.get(kind, 0):
            logger.warning(
                "workers: %d of %g %ss, but only %g of the cluster's %g are free now: the run waits for the rest",
                fewest, each, kind, free.get(kind, 0), has[kind],
            )  # fmt: skip
    if cluster_address() is not None and needs["CPU"] * asked.workers >= has["CPU"]:
        logger.warning(
            "workers: they take all %g CPUs of the cluster; Ray Data jobs beside them will wait (--cpus-per-worker)",
            has["CPU"],
        )


class _Fit(threading.Thread):
    """``trainer.fit()`` aside: in the main thread it would take Ctrl-C for itself and leave this process."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True, name="dmm-fit")
        self.trainer, self.error = trainer, Exception("the trainer ended without a result")
        self.start()

    def run(self) -> None:
        """Keep the error that the trainer ends with."""
        from ray.exceptions import RayError
        from ray.train.v2.api.exceptions import TrainingFailedError

        try:
            self.trainer.fit()
        except (TrainingFailedError, RayError) as e:
            self.error = e


class Waiting:
    """Says, now and then, that no workers have started: Ray tries again for ever."""

    def __init__(self, out: str, needs: dict[str, float]) -> None:
        self.marker, self.needs = _path(out, STARTED), needs
        self.since = self.said = time.monotonic()

    def look(self) -> None:
        """Warn if workers have been missing for long."""
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
    """A callback that takes the sign away that workers run, once one of them has ended with an error."""
    from ray.train import UserCallback

    class LostWorkers(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            fs, path = filesystem(marker)
            if fs.exists(path):
                fs.rm_file(path)

    return LostWorkers()


def clear(out: str) -> None:
    """Delete what a Ray run left: its own state, refusals and stop requests."""
    remove_folder(join(out, RAY_FOLDER))


def _path(out: str, name: str) -> str:
    return join(out, RAY_FOLDER, name)


def _raise_refusal(out: str) -> None:
    """Raise what a worker refused, which is no crash to be tried again."""
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
            raise  # others may wait for this one: Ray ends them all, and started again they end at the check above
    except Exception as e:
        raise WorkerError(*Failure.of(e, MEMORY_OPTIONS)) from e
