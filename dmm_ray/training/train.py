"""``dmm train``: checks, the Ray Train run, the finished folder."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dmm_ray.activations.store import ActivationStore
from dmm_ray.cluster import ensure_ray
from dmm_ray.config import one_line, versions
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.files import absolute, exists, filesystem, join, make_folder, read_json, write_json
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.normalizer import variance_floor
from dmm_ray.training import checkpoint
from dmm_ray.training.checkpoint import Notice, RayNotices
from dmm_ray.training.config import TrainConfig, check_same
from dmm_ray.training.loop import Place, Run
from dmm_ray.training.tracking import StatusLines, read_stats

logger = logging.getLogger(__name__)
RUN, SUMMARY = "train.json", "summary.json"
RAY_FOLDER, REFUSAL, STOP, DONE = ".ray", "refused.json", "stop.json", "done.json"
STOP_S = 60
"""Time that workers have to save and end."""


def train(config: TrainConfig) -> str:
    """Train a prior; the same configuration on the same folder resumes, or returns at once when it is finished.

    Returns:
        The prior's folder.

    Raises:
        UserError: no store, a layer it lacks, non-finite rows, a folder that holds something else or another run.
        CheckFailed: the loss became NaN, or workers crashed more often than allowed.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written before, unless it came twice.
    """
    started = time.perf_counter()
    config = config.model_copy(
        update={"out": absolute(config.out), "activations": absolute(config.activations)}
    )
    store = ActivationStore.open(config.activations)
    prior_config = _prior_config(config, store)
    if _claim(config, prior_config):
        logger.info("%s: this run is finished already", config.out)
        return config.out
    status = StatusLines(config)
    status.start()
    try:
        if config.workers == 0:
            _train_here(config, prior_config)
        else:
            _train_on_ray(config, prior_config)
    finally:
        status.stop()
    checkpoint.finish(config.out, config.kept_checkpoints)
    _summarise(config, prior_config, time.perf_counter() - started)
    return config.out


def _prior_config(config: TrainConfig, store: ActivationStore) -> PriorConfig:
    layer = config.layer if config.layer is not None else store.layers[0]
    if layer not in store.layers or (config.layer is None and len(store.layers) > 1):
        raise UserError(
            f"layer: {store.uri} holds layers {', '.join(map(str, store.layers))}; name one with --layer"
        )
    shape = config.shape(store.d)
    manifest = store.manifest
    return PriorConfig(
        d=store.d,
        layers=(layer,),
        d_model=shape.d_model,
        d_mlp=shape.d_mlp,
        n_blocks=shape.n_blocks,
        variance_floor=variance_floor(torch.from_numpy(store.statistics(layer).var)),
        subject=manifest.subject.model_dump() | {"tokenizer_hash": manifest.tokenizer_hash},
        subject_layers=manifest.subject.n_layers,
        split=config.split.model_dump(),
        training={"samples": config.total_samples, "seed": config.seed, "store": manifest.config_hash},
    )


def _claim(config: TrainConfig, prior_config: PriorConfig) -> bool:
    """Take the output folder for this run; True when the run is finished there already."""
    marker = join(config.out, RUN)
    if not exists(marker):
        fs, path = filesystem(config.out)
        found = {p.rstrip("/").split("/")[-1] for p in fs.ls(path, detail=False)} if fs.isdir(path) else set()
        if found:
            raise UserError(
                f"{config.out}: holds {sorted(found)[0]}, not a run of ours; choose another --out"
            )
        make_folder(config.out)
        write_json(
            marker, {"train": config.model_dump(mode="json"), "prior": prior_config.model_dump(mode="json")}
        )
        return False
    saved = read_json(marker)
    try:
        check_same(TrainConfig.model_validate(saved["train"]), config)
    except (KeyError, ValidationError) as e:
        why = one_line(e) if isinstance(e, ValidationError) else f"no {e}"
        raise UserError(f"{marker}: not a run of this version ({why}); choose another --out") from e
    for field, new in prior_config.model_dump(mode="json").items():
        if (old := saved["prior"].get(field)) != new:
            raise UserError(
                f"{config.out}: holds a run on another store or model ({field} = {old!r}, not {new!r}); "
                "choose another --out"
            )
    return exists(join(config.out, SUMMARY))


def _device(config: TrainConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


class Interrupt:
    """While it is entered, in the main thread, SIGINT and SIGTERM are noted; a second one interrupts at once."""

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        logger.warning("interrupted: saving a checkpoint; once more to end at once")


def _train_here(config: TrainConfig, prior_config: PriorConfig) -> None:
    """Run in this process."""
    run = Run(config, prior_config, Place(0, 1, torch.device(_device(config))))
    with Interrupt() as interrupt:
        if not run.train(lambda _: Notice.STOP if interrupt.noted else Notice.GO_ON):
            raise KeyboardInterrupt


def _train_on_ray(config: TrainConfig, prior_config: PriorConfig) -> None:
    """Run the workers, and have them stop when this process is told to."""
    ensure_ray()
    if (samples := checkpoint.newest(config.out)) is not None:  # the workers' own log does not reach the user
        logger.info("resuming after %d samples", samples)
    _clear(config.out)
    trainer = _trainer(config, prior_config)
    with Interrupt() as interrupt:
        fit = _Fit(trainer)
        while fit.is_alive() and not interrupt.noted:
            fit.join(0.2)
        if fit.is_alive():
            write_json(join(config.out, RAY_FOLDER, STOP), {})
            fit.join(STOP_S)
        if fit.is_alive():
            logger.warning("the workers did not stop within %d s; the last checkpoint is kept", STOP_S)
            raise KeyboardInterrupt
    _raise_refusal(config.out)
    finished = exists(join(config.out, RAY_FOLDER, DONE))
    _clear(config.out)
    if not finished and interrupt.noted:
        raise KeyboardInterrupt
    if not finished:
        raise CheckFailed(f"training failed: {' '.join(str(fit.error).split())[-500:]}") from fit.error


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


def _trainer(config: TrainConfig, prior_config: PriorConfig) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    use_gpu = config.device == "cuda" or (
        config.device == "auto" and resources.get("GPU", 0) >= config.workers
    )
    cpus = config.cpus_per_worker or _default_cpus(config, resources.get("CPU", 1), use_gpu)
    if cpus * config.workers > resources.get("CPU", 0):
        raise UserError(
            f"workers: {config.workers} of {cpus:g} CPUs need more than the cluster's {resources.get('CPU', 0):g}; "
            "lower --workers or --cpus-per-worker"
        )
    return TorchTrainer(
        _worker,
        train_loop_config={"train": config, "prior": prior_config, "threads": max(1, int(cpus))},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=config.out,
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _default_cpus(config: TrainConfig, cpus: float, use_gpu: bool) -> float:
    return 1 if use_gpu else max(1, math.floor(cpus / config.workers))


def _clear(out: str) -> None:
    """Delete what a Ray run left: its own state, refusals and stop requests."""
    fs, path = filesystem(join(out, RAY_FOLDER))
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _raise_refusal(out: str) -> None:
    """Raise what a worker refused, which is no crash to be tried again."""
    path = join(out, RAY_FOLDER, REFUSAL)
    if exists(path):
        refusal = read_json(path)
        _clear(out)
        raise (UserError if refusal["bad_input"] else CheckFailed)(refusal["message"])


def _worker(loop_config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device(), on_ray=True)
    os.environ.setdefault("WANDB_SILENT", "true")

    def wrap(denoiser: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(denoiser)

    config: TrainConfig = loop_config["train"]
    refusal = join(config.out, RAY_FOLDER, REFUSAL)
    if exists(refusal):
        return
    try:
        run = Run(config, loop_config["prior"], place, wrap if place.world > 1 else None)
        notices = RayNotices(join(config.out, RAY_FOLDER, STOP), place.rank, place.world)
        if run.train(notices) and place.rank == 0:
            write_json(join(config.out, RAY_FOLDER, DONE), {})
    except (UserError, CheckFailed) as e:
        write_json(refusal, {"message": str(e), "bad_input": isinstance(e, UserError)})
        if place.world > 1:
            raise  # others may wait for this one: Ray ends them all, and started again they end at the check above


def _summarise(config: TrainConfig, prior_config: PriorConfig, seconds: float) -> None:
    records = read_stats(config.out)
    summary = {
        "figures": {
            "samples": records[-1]["samples"],
            "loss": records[-1]["loss"],
            "validation_loss": records[-1]["validation_loss"],
            "samples_per_s": sorted(r["samples_per_s"] for r in records)[len(records) // 2],
        },
        "inputs": {"config": config.model_dump(mode="json"), "prior": prior_config.model_dump(mode="json")},
        "versions": versions(),
        "seconds": seconds,
    }
    write_json(join(config.out, SUMMARY), summary)
