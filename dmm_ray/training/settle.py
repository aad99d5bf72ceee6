"""Choices left to the machine, made once and recorded: a run's precision, and the samples that fit into a time.

Everything else about a run is a function of its configuration. To make these so too, they are decided before the first
batch, written into the run's folder, and read from there whenever the run resumes, on whatever machine.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from contextlib import closing

import torch

from dmm_ray.errors import UserError
from dmm_ray.precision import choose_precision, precision_on
from dmm_ray.prior.config import PriorConfig
from dmm_ray.ray_session import call_on_workers, ensure_ray, workers_have_fast_bfloat16
from dmm_ray.training.config import DEFAULT_SAMPLES, TrainConfig
from dmm_ray.training.loop import Trainer
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.ray_trainer import worker_needs
from dmm_ray.training.run_folder import SavedRun

logger = logging.getLogger(__name__)
TRIAL_S, WARM_UP, FEWEST_STEPS = 5.0, 3, 5
"""Duration of a trial, its warm-up steps, and its minimum number of steps."""
VALIDATIONS = 10
"""Validation losses of a run with the default configuration."""


def check_length(config: TrainConfig) -> None:
    """Raises UserError if both a number of samples and a time are given."""
    if config.schedule.samples is not None and config.schedule.minutes is not None:
        raise UserError("minutes: excludes samples; give --samples or --minutes, not both")


def settle_from(config: TrainConfig, saved: SavedRun) -> TrainConfig:
    """``config`` with its open choices filled in from the run in its folder."""
    schedule = config.schedule
    chosen: dict[str, object] = {}
    if config.precision == "auto":
        chosen["precision"] = saved.config.precision
    if schedule.minutes is not None:
        chosen["samples"] = saved.config.schedule.samples
    elif schedule.samples is None:
        chosen["samples"] = DEFAULT_SAMPLES
    elif schedule.samples == saved.config.schedule.samples:
        chosen["minutes"] = saved.config.schedule.minutes  # the number chosen by the trial, given explicitly
    return config.model_copy(update=chosen)


def settle_precision(config: TrainConfig) -> TrainConfig:
    """``config`` with the precision of a new run: bfloat16 if it is fast on its workers' devices."""
    if config.precision != "auto":
        return config
    if config.distribution.workers == 0:
        precision = precision_on("auto", local_device(config.distribution.device))
    else:
        ensure_ray()
        needs = worker_needs(config)
        fast = workers_have_fast_bfloat16(needs["CPU"], needs.get("GPU", 0.0))
        precision = choose_precision("auto", fast)
    logger.info("precision: %s, the faster one on the devices (--precision to choose)", precision)
    return config.model_copy(update={"precision": precision})


def settle_samples(config: TrainConfig, prior_config: PriorConfig) -> TrainConfig:
    """``config`` with the samples of a new run, from a trial if a time is given.

    Raises:
        UserError: as for a run, or the time is not enough for a batch.
    """
    schedule, workers = config.schedule, config.distribution.workers
    if schedule.minutes is None:
        return config.model_copy(update={"samples": schedule.samples or DEFAULT_SAMPLES})
    share = -(-schedule.batch // max(workers, 1))
    trial = config.model_copy(
        update={
            "batch": share,
            "levels_per_batch": math.gcd(schedule.levels_per_batch, share),
            "samples": DEFAULT_SAMPLES,
            "parallel": "ddp",
        }
    )
    if workers == 0:
        found = [try_steps(trial, prior_config, local_device(config.distribution.device))]
    else:
        ensure_ray()
        needs = worker_needs(config)
        device = "cuda" if "GPU" in needs else "cpu"
        # All at once: they share a machine's memory and cores, as they will in the run.
        found = call_on_workers(
            workers,
            try_steps,
            trial,
            prior_config,
            device,
            max(1, int(needs["CPU"])),
            cpus=needs["CPU"],
            gpus=needs.get("GPU", 0.0),
        )
    step_s, validation_s = max(found)
    batches = int((60 * schedule.minutes - VALIDATIONS * validation_s) / step_s)
    if batches < 1:
        raise UserError(
            f"minutes: {schedule.minutes:g} are not enough for one batch of {step_s:.1f} s; give more"
        )
    samples = batches * schedule.batch
    rate = schedule.batch / step_s
    logger.info(
        "samples: %d, about %g minutes at %.0f per second in a short trial",
        samples,
        schedule.minutes,
        rate,
    )
    return config.model_copy(update={"samples": samples})


def try_steps(
    config: TrainConfig, prior_config: PriorConfig, device: str, threads: int | None = None
) -> tuple[float, float]:
    """Seconds of a training step (median) and of a validation loss, from a few steps that are discarded.

    Args:
        config: the trial's configuration; its folder holds no checkpoint.
        prior_config: configuration of the prior to train.
        device: where to compute.
        threads: number of torch threads; None leaves it unchanged.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    run = Trainer(config, prior_config, RankInfo(0, 1, torch.device(device)))
    seconds: list[float] = []
    with closing(run.step_seconds()) as steps:
        started = time.perf_counter()
        for number, taken in enumerate(steps):
            if number >= WARM_UP:
                seconds.append(taken)
            if len(seconds) >= FEWEST_STEPS and time.perf_counter() - started >= TRIAL_S:
                break
    started = time.perf_counter()
    run.validation_loss()
    return statistics.median(seconds), time.perf_counter() - started


def local_device(device: str) -> str:
    """``device`` in this process, with auto resolved."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
