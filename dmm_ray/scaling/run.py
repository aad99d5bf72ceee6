"""``dmm scaling``: the grid as Ray tasks, each of which resumes, then the law and its plot."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmm_ray.config import refuse_other
from dmm_ray.errors import CheckFailed
from dmm_ray.evaluation.data import check_same_model, model_source, open_corpus
from dmm_ray.failures import cause_of
from dmm_ray.files import absolute, exists, join, make_folder, read_bytes, write_json
from dmm_ray.provenance import write_summary
from dmm_ray.ray_session import ensure_ray
from dmm_ray.scaling.cell import evaluation, finished, run_cell
from dmm_ray.scaling.config import Cell, ScalingConfig
from dmm_ray.scaling.law import FittedLaw, fit_law, frontier
from dmm_ray.scaling.plot import plot
from dmm_ray.store.reader import ActivationStore

logger = logging.getLogger(__name__)
GRID_FILE = "grid.json"


def scaling(config: ScalingConfig) -> str:
    """Run every cell that is not finished, fit the law, write ``summary.json`` and ``scaling.png``; returns the folder.

    Raises:
        UserError: the folder holds another grid, the inputs do not belong together, or too few cells are on the
            frontier.
        CheckFailed: a cell failed; the others are kept.
    """
    start = time.perf_counter()
    config = config.model_copy(
        update={"out": absolute(config.out), "activations": absolute(config.activations)}
    )
    _check_inputs(config)
    cells = config.cells
    found = {cell: result for cell in cells if (result := finished(config, cell)) is not None}
    if found:
        logger.info("%d of %d cells are finished", len(found), len(cells))
    for cell, result in _run(config, [cell for cell in cells if cell not in found]):
        found[cell] = result
        logger.info(
            "cell %d of %d: %s, %s samples: loss %.4f",
            len(found), len(cells), f"{cell.d_model}x{cell.n_blocks}", f"{cell.samples:,}", result["loss"],
        )  # fmt: skip
    results = [found[cell] for cell in cells]
    compute, loss = (np.array([r[name] for r in results], dtype=float) for name in ("flops", "loss"))
    best = frontier(compute, loss)
    law = fit_law(compute[best].tolist(), loss[best].tolist(), config.resamples, config.seed)
    logger.info("%s", describe(law))
    plot(config.out, results, best.tolist(), law)
    write_summary(
        config.out,
        {
            "cells": results,
            "frontier": [results[i]["name"] for i in best],
            "law": law.law._asdict(),
            "intervals": law.intervals,
        },
        config.model_dump(mode="json"),
        time.perf_counter() - start,
    )
    return config.out


def describe(found: FittedLaw) -> str:
    """The law in a line, with its 95 % intervals."""
    parts = {
        name: f"{getattr(found.law, name):.4g} ({low:.4g} to {high:.4g})"
        for name, (low, high) in found.intervals.items()
    }
    return (
        f"L(C) = E + A (C / {found.law.scale:.3g} FLOPs)^-a, E = {parts['irreducible']}, "
        f"A = {parts['amplitude']}, a = {parts['exponent']}"
    )


def _check_inputs(config: ScalingConfig) -> None:
    """Before hours of training: the store's text and model are there, and the folder is this grid's."""
    store = ActivationStore.open(config.activations)
    tested = evaluation(config, config.out, config.out)
    check_same_model(model_source(tested, store).resolve(), store)
    open_corpus(tested, store)
    path, identity = join(config.out, GRID_FILE), {**config.identity(), "store": store.manifest.config_hash}
    if exists(path):
        refuse_other(config.out, json.loads(read_bytes(path)), identity)
        return
    make_folder(config.out)
    write_json(path, identity)


def _run(config: ScalingConfig, cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield cells with their results as they finish; a failed cell is raised after the others have finished."""
    if not cells:
        return
    ensure_ray()
    import ray
    from ray.exceptions import RayError, RayTaskError

    options = {"num_cpus": config.cpus_per_cell, "num_gpus": config.gpus_per_cell, "max_calls": 1}
    task = ray.remote(**options)(_in_task)
    # The dearest first: a cheap one at the end leaves no worker idle for long.
    running = {task.remote(config, cell): cell for cell in reversed(cells)}
    failed: Exception | None = None
    try:
        while running:
            [done], _ = ray.wait(list(running))
            cell = running.pop(done)
            try:
                yield cell, ray.get(done)
            except RayTaskError as e:
                logger.error("cell %s: %s", cell.name, cause_of(e.cause))
                failed = failed or e.cause
            except RayError as e:  # its process died, again and again
                message = f"cell {cell.name}: {cause_of(e, '--cpus-per-cell')}"
                logger.error("%s", message)
                failed = failed or CheckFailed(message)
    finally:
        for reference in running:  # interrupted; the same command resumes these from their last checkpoints
            ray.cancel(reference, force=True)
    if failed is not None:
        raise failed


def _in_task(config: ScalingConfig, cell: Cell) -> dict[str, Any]:
    import torch

    torch.set_num_threads(max(1, int(config.cpus_per_cell)))
    return run_cell(config, cell)
