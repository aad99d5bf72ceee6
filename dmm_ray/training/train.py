"""``dmm train``: checks, the Ray Train run, the finished folder."""

from __future__ import annotations

import logging
import math
import os
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
from dmm_ray.training.config import TrainConfig, check_same
from dmm_ray.training.loop import Place, Run
from dmm_ray.training.tracking import StatusLines, read_stats

logger = logging.getLogger(__name__)
RUN, SUMMARY = "train.json", "summary.json"
RAY_FOLDER, REFUSAL = ".ray", "refused.json"


def train(config: TrainConfig) -> str:
    """Train a prior; the same configuration on the same folder resumes, or returns at once when it is finished.

    Returns:
        The prior's folder.

    Raises:
        UserError: no store, a layer it lacks, non-finite rows, a folder that holds something else or another run.
        CheckFailed: the loss became NaN, or workers crashed more often than allowed.
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
    if done := checkpoint.complete(config.out):  # said here: the workers' own log does not reach the user
        logger.info("resuming after %d samples", done[-1])
    status = StatusLines(config)
    status.start()
    try:
        if config.workers == 0:
            Run(config, prior_config, Place(0, 1, torch.device(_device(config)))).train()
        else:
            _fit(config, prior_config)
    finally:
        status.stop()
    checkpoint.remove(config.out)
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
    if saved["prior"] != prior_config.model_dump(mode="json"):
        raise UserError(f"{config.out}: holds a run on another store or model; choose another --out")
    return exists(join(config.out, SUMMARY))


def _device(config: TrainConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _fit(config: TrainConfig, prior_config: PriorConfig) -> None:
    """Run the workers on Ray Train."""
    ensure_ray()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

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
    trainer = TorchTrainer(
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
    try:
        trainer.fit()
        _raise_refusal(config.out)
    except TrainingFailedError as e:
        raise CheckFailed(f"training failed: {' '.join(str(e).split())[-500:]}") from e
    finally:
        fs, path = filesystem(join(config.out, RAY_FOLDER))
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _default_cpus(config: TrainConfig, cpus: float, use_gpu: bool) -> float:
    return 1 if use_gpu else max(1, math.floor(cpus / config.workers))


def _raise_refusal(out: str) -> None:
    """Raise what a worker refused, which is no crash to be tried again."""
    path = join(out, RAY_FOLDER, REFUSAL)
    if exists(path):
        refusal = read_json(path)
        raise (UserError if refusal["bad_input"] else CheckFailed)(refusal["message"])


def _worker(loop_config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(loop_config["threads"])
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device())
    os.environ.setdefault("WANDB_SILENT", "true")

    def wrap(denoiser: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(denoiser)

    config: TrainConfig = loop_config["train"]
    try:
        Run(config, loop_config["prior"], place, wrap if place.world > 1 else None).train()
    except (
        UserError,
        CheckFailed,
    ) as e:  # every worker sees the same rows and losses, so all of them end here
        refusal = {"message": str(e), "bad_input": isinstance(e, UserError)}
        write_json(join(config.out, RAY_FOLDER, REFUSAL), refusal)


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
