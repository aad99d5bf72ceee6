"""One cell of the grid: train a prior, then measure it on test documents."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dmm_ray.evaluation import lm
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs, load
from dmm_ray.evaluation.fidelity import NoisedRows, squared_errors, summarize
from dmm_ray.evaluation.methods import PriorDenoiser
from dmm_ray.evaluation.stages import HEADLINE_LEVEL
from dmm_ray.evaluation.statistics import clustered
from dmm_ray.files import exists, join, read_bytes, write_json
from dmm_ray.scaling.config import Cell, ScalingConfig
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loop import flops
from dmm_ray.training.train import train

RESULT = "cell.json"
CHECK_ROWS = 1000
"""Training and validation rows that are read for nothing else than to check the inputs."""


def folder(config: ScalingConfig, cell: Cell) -> str:
    """Where a cell's prior and result are."""
    return join(config.out, "cells", cell.name)


def finished(config: ScalingConfig, cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell; None if it is not finished."""
    path = join(folder(config, cell), RESULT)
    return json.loads(read_bytes(path)) if exists(path) else None


def run_cell(config: ScalingConfig, cell: Cell) -> dict[str, Any]:
    """Train or resume the cell's prior, measure it, and write the result beside it."""
    place = folder(config, cell)
    this = TrainConfig.model_validate(
        {
            "activations": config.activations,
            "out": join(place, "prior"),
            "layer": config.layer,
            "d_model": cell.d_model,
            "d_mlp": 2 * cell.d_model,
            "n_blocks": cell.n_blocks,
            "samples": cell.samples,
            "batch": config.batch,
            "lr": config.lr,
            "base": config.base,
            "precision": config.precision,
            "workers": 0,
            "calibration_rows": 0,
            "seed": config.seed,
        }
    )
    inputs = load(evaluation(config, train(this), place))
    result = {**_cost(this, cell, inputs), **_measure(config, inputs)}
    write_json(join(place, RESULT), result)
    return result


def evaluation(config: ScalingConfig, prior: str, out: str) -> EvaluateConfig:
    """How a cell's prior is tested."""
    return EvaluateConfig.model_validate(
        {
            "prior": prior,
            "activations": config.activations,
            "out": out,
            "layer": config.layer,
            "text": config.text,
            "subject": config.subject,
            "max_rows": config.max_rows,
            "train_rows": CHECK_ROWS,
            "validation_rows": CHECK_ROWS,
            "unseen_prefix": False,
            "seed": config.seed,
        }
    )


def _cost(this: TrainConfig, cell: Cell, inputs: EvaluationInputs) -> dict[str, Any]:
    denoiser, schedule = inputs.prior.denoiser, this.schedule
    per_batch = flops(denoiser, schedule.batch, schedule.levels)
    return {
        **cell._asdict(),
        "name": cell.name,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "flops": per_batch * schedule.total_batches,
    }


def _measure(config: ScalingConfig, inputs: EvaluationInputs) -> dict[str, Any]:
    noised = NoisedRows.assign(len(inputs.test.z), config.seed)
    method = PriorDenoiser(inputs.prior, inputs.layer)
    errors = squared_errors({"prior": method}, inputs.test, noised)["prior"]
    loss = summarize([(noised, errors)], inputs.test.docs)
    found: dict[str, Any] = {
        "loss": loss.overall and loss.overall.mean,
        "loss_stderr": loss.overall and loss.overall.stderr,
        "loss_by_decile": loss.by_decile,
        "delta_lm_loss": None,
    }
    if config.lm_documents and not inputs.subject.bidirectional:
        documents = lm.Documents(
            inputs.subject, inputs.layer, lm.draw(inputs.tokens, config.lm_documents, config.seed)
        )
        base = documents.losses()
        restored = lm.sampled(inputs, documents.capture(), documents.ids, HEADLINE_LEVEL, config.seed)
        scored = ~np.isnan(base)
        delta = clustered(documents.deltas([restored], base)[scored], documents.ids[scored, 0].numpy())
        found["delta_lm_loss"] = delta and delta.mean
    return found
