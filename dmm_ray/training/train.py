"""``dmm train``: checks, the run, the finished folder."""

from __future__ import annotations

import logging
import time

import torch

from dmm_ray.errors import UserError
from dmm_ray.failures import remove_traces
from dmm_ray.files import absolute, make_folder
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.normalizer import variance_floor
from dmm_ray.provenance import write_summary
from dmm_ray.ray_session import call_on_workers, cluster_address
from dmm_ray.store.reader import ActivationStore
from dmm_ray.training import checkpoint
from dmm_ray.training.base import settle_base
from dmm_ray.training.calibrate import calibrate_prior_on_store
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loop import Trainer
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.ray_trainer import train_on_ray
from dmm_ray.training.run_folder import claim_folder, saved_run
from dmm_ray.training.settle import (
    check_length,
    local_device,
    settle_from,
    settle_precision,
    settle_samples,
)
from dmm_ray.training.signals import InterruptHandler, RunSignal
from dmm_ray.training.tracking import StatusLines, read_stats
from dmm_ray.units.lock import WriterLock, writer_lock

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> str:
    """Train a prior; the same configuration on the same folder resumes, or returns immediately if it has finished.

    Returns:
        The prior's folder.

    Raises:
        UserError: no store, a layer it lacks, rows with NaN or Inf, or a folder that holds something else or another
            run, or that another process is writing to.
        CheckFailed: the loss became NaN, or workers crashed more often than allowed.
        KeyboardInterrupt: on SIGINT or SIGTERM, after writing a checkpoint unless the signal came twice.
    """
    config = config.model_copy(
        update={"out": absolute(config.out), "activations": absolute(config.activations)}
    )
    check_length(config)
    store = ActivationStore.open(config.activations)
    _prior_config(config, store)  # raises on bad input before anything is written
    if not _is_finished(config, store):
        make_folder(config.out)
        with writer_lock(config.out) as lock:
            if not _is_finished(config, store):  # another process may have finished it since
                config = _settle(config, store)
                _train(config, _prior_config(config, store), lock)
                return config.out
    logger.info("%s: this run has already finished", config.out)
    return config.out


def _is_finished(config: TrainConfig, store: ActivationStore) -> bool:
    """Whether the run has already finished in its folder. Raises UserError for a folder of another run."""
    saved = saved_run(config.out)
    if saved is None:
        return False
    asked = settle_from(config, saved)
    saved.check(asked, _prior_config(asked, store))
    return saved.finished


def _settle(config: TrainConfig, store: ActivationStore) -> TrainConfig:
    """The configuration with nothing left open, as recorded in the folder or, if that is free, recorded there now."""
    saved = saved_run(config.out)
    if saved is not None:
        return settle_from(config, saved)
    config = settle_precision(config)
    settle_base(config, _prior_config(config, store), local_device(config.distribution.device))
    config = settle_samples(config, _prior_config(config, store))
    claim_folder(config, _prior_config(config, store))
    return config


def _train(config: TrainConfig, prior_config: PriorConfig, lock: WriterLock) -> None:
    """Run to the end in a folder whose lock is held."""
    started = time.perf_counter()
    needs: dict[str, float] | None = None
    status = StatusLines(config)
    status.start()
    try:
        if config.distribution.workers == 0:
            _train_here(config, prior_config, lock)
        else:
            needs = train_on_ray(config, prior_config, lock.check)
    finally:
        status.stop()
    _calibrate(config, needs)
    checkpoint.finish(
        config.out, config.checkpoints.retention
    )  # last, so that a run killed before this point can resume from them
    remove_traces(config.out)
    _summarise(config, prior_config, time.perf_counter() - started)


def _prior_config(config: TrainConfig, store: ActivationStore) -> PriorConfig:
    layer = config.layer if config.layer is not None else store.layers[0]
    if layer not in store.layers or (config.layer is None and len(store.layers) > 1):
        raise UserError(
            f"layer: {store.uri} holds layers {', '.join(map(str, store.layers))}; name one with --layer"
        )
    shape = config.network.shape(store.d)
    manifest = store.manifest
    return PriorConfig(
        d=store.d,
        layers=(layer,),
        d_model=shape.d_model,
        d_mlp=shape.d_mlp,
        n_blocks=shape.n_blocks,
        base=config.analytic.base,
        variance_floor=variance_floor(torch.from_numpy(store.statistics(layer).var)),
        subject=manifest.subject.model_dump(mode="json", exclude={"resolved": {"versions"}})
        | {"tokenizer_hash": manifest.tokenizer_hash},
        subject_layers=manifest.subject.n_layers,
        split=config.split.model_dump(),
        training={
            "samples": config.schedule.total_samples,
            "seed": config.seed,
            "precision": config.precision,
            "store": manifest.config_hash,
            "window": manifest.window,
            "kept": manifest.kept.model_dump(),
        },
    )


def _train_here(config: TrainConfig, prior_config: PriorConfig, lock: WriterLock) -> None:
    """Run in this process."""
    device = torch.device(local_device(config.distribution.device))
    run = Trainer(config, prior_config, RankInfo(0, 1, device))
    with InterruptHandler() as interrupt:

        def signal_after(_: int) -> RunSignal:
            lock.check()
            return RunSignal.STOP if interrupt.noted else RunSignal.CONTINUE

        if not run.train(signal_after):
            raise KeyboardInterrupt


def _calibrate(config: TrainConfig, needs: dict[str, float] | None) -> None:
    """Calibrate the finished prior; without validation rows it is skipped, as a warning has already said.

    A cluster's workers may have GPUs that this machine lacks: there, a worker with the same resources does it.
    """
    if not config.validation.calibration_rows or read_stats(config.out)[-1]["validation_loss"] is None:
        return
    logger.info("calibrating the prior's percentiles")
    device = "cpu" if config.distribution.device == "cpu" else "auto"
    arguments = (
        config.out,
        config.activations,
        config.validation.calibration_rows,
        config.seed,
        device,
        config.precision,
    )
    if needs and (cluster_address() or "GPU" in needs):
        resources = {"cpus": needs["CPU"], "gpus": needs.get("GPU", 0.0)}
        call_on_workers(1, calibrate_prior_on_store, *arguments, **resources)
    else:
        calibrate_prior_on_store(*arguments)


def _summarise(config: TrainConfig, prior_config: PriorConfig, seconds: float) -> None:
    records = read_stats(config.out)
    figures = {
        "samples": records[-1]["samples"],
        "loss": records[-1]["loss"],
        "validation_loss": records[-1]["validation_loss"],
        "samples_per_s": sorted(r["samples_per_s"] for r in records)[len(records) // 2],
    }
    inputs = {"config": config.model_dump(mode="json"), "prior": prior_config.model_dump(mode="json")}
    write_summary(config.out, {"figures": figures}, inputs, seconds)
