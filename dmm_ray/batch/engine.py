"""Turns a unit of documents into one shard: read the rows, run the prior, write, record."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_ray.batch.operations import ACTIVATION, BatchOperation, Found
from dmm_ray.batch.outputs import write_unit
from dmm_ray.batch.selection import RowSource
from dmm_ray.errors import UserError
from dmm_ray.files import exists, hash_json, join, sha256, write_bytes
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.folder import CALIBRATION, resolve
from dmm_ray.store.manifest import Manifest, read_record, record_name
from dmm_ray.store.moments import Moments
from dmm_ray.store.reader import Rows
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.unit import Unit

BATCH_FLOATS = 1 << 26
"""Approximate maximum number of values in the results of a batch."""


@dataclass(frozen=True)
class PriorTask:
    """The parameters shared by all actors of a run."""

    out: str
    manifest: Manifest
    source: RowSource
    operation: BatchOperation
    device: str
    threads: int
    batch_rows: int | None


class PriorActor(UnitActor):
    """An actor that holds a prior, loaded for the first unit.

    ``work`` may be called from several threads: they read and write with numpy while a dedicated thread runs the prior.
    (Every thread that computes with torch gets its own OpenMP threads; with more in total than cores, they hardly spin
    while waiting.)
    """

    memory_options = "--batch-rows or --rows-per-shard"

    def __init__(self, task: PriorTask) -> None:
        super().__init__(task.out)
        self.task = task
        self._thread = ThreadPoolExecutor(1, "dmm-prior")

    @cached_property
    def prior(self) -> ActivationPrior:
        """The prior on its device. Raises UserError if the device is missing or the prior has changed."""
        assert self.task.manifest.derived is not None
        if self.task.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "gpus_per_actor: torch finds no GPU in the actor; install a CUDA build of torch or set it to 0"
            )
        torch.set_num_threads(self.task.threads)
        about = self.task.manifest.derived
        prior = ActivationPrior.from_pretrained(about.prior)
        calibration = about.arguments.get("calibration")
        same = hash_prior(prior.config, prior.state_dict()) == about.prior_hash
        if not same or (calibration is not None and hash_calibration(about.prior) != calibration):
            raise UserError(f"prior: {about.prior} has changed since this job started; choose another --out")
        return prior.to(self.task.device)

    def work(self, unit: Unit) -> dict[str, Any]:
        """Process a unit and return its number of ``rows``. A unit that has its record is already done.

        Raises:
            UserError: the prior rejects the rows or arguments.
            OSError: the folder is not writable.
        """
        out, manifest = self.task.out, self.task.manifest
        name = join(out, record_name(unit.unit))
        if exists(name) and (done := read_record(out, unit.unit)).config_hash == manifest.config_hash:
            return {"rows": done.rows}
        rows = self.task.source.rows(unit)
        ids = torch.from_numpy(np.stack([rows.doc, rows.position.astype(np.int64)], axis=1))
        found, moments = self._thread.submit(self._ask, rows, ids).result()
        with self.turn():
            record = write_unit(out, manifest, unit, rows, found, moments)
            write_bytes(name, record.model_dump_json(indent=2).encode() + b"\n")
        return {"rows": record.rows}

    def _ask(self, rows: Rows, ids: Tensor) -> tuple[Found, Moments | None]:
        """The results, with the moments if they are activations."""
        operation, found = self.task.operation, self.task.operation.nothing
        if len(ids):
            found = operation.unit(self.prior, rows, self._batches(rows.activation, ids))
        if self.task.manifest.is_table:
            return found, None
        return found, Moments.of(found[ACTIVATION], self.task.manifest.covariance)[0]

    def _batches(self, x: Tensor, ids: Tensor) -> Found:
        size = min(self.task.batch_rows or len(x), max(1, BATCH_FLOATS // self.task.operation.width))
        parts = [
            self.task.operation.batch(self.prior, x[at : at + size], ids[at : at + size])
            for at in range(0, len(x), size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def hash_calibration(prior: str) -> str | None:
    """SHA-256 of the calibration of the prior at ``prior``; None if it has none."""
    path = join(resolve(prior), CALIBRATION)
    return sha256(path) if exists(path) else None


def hash_prior(config: PriorConfig, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over a prior's configuration and its tensors by name, in float32."""
    hashes = {}
    for name, tensor in tensors.items():
        raw = tensor.detach().to("cpu", torch.float32).contiguous()
        hashes[name] = hashlib.sha256(raw.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return hash_json({"config": config.model_dump(mode="json"), "tensors": hashes})
