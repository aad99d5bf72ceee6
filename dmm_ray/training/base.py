"""The base of a prior (``dmm_ray.prior.base``), fitted on training rows before the first step."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import exists, hash_json, iter_chunks, join, write_bytes
from dmm_ray.gaussians import (
    GaussianMixture,
    choose_analysers,
    choose_diagonal,
    fit_gaussian,
    flow_matching_loss,
)
from dmm_ray.prior.base import PREFIX, base_from_tensors
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.weights import read_header, read_tensors
from dmm_ray.store.match import check_finite
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TRAIN, VALIDATION
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loader import store_normalizer

logger = logging.getLogger(__name__)
FILE = "base.safetensors"
IDENTITY = "identity"
"""Key in the file's metadata: the hash of everything that determines its content."""
CHOICE_ROWS = 4096
"""Number of validation rows that its size is chosen on."""


def settle_base(config: TrainConfig, prior_config: PriorConfig, device: str) -> None:
    """Fit the base of a run and write it to the run's folder, unless it is already there.

    Args:
        config: the run's configuration.
        prior_config: configuration of the prior to train.
        device: device to fit on.

    Raises:
        UserError: no validation rows to choose its size on, or rows that contain NaN or Inf.
    """
    if config.analytic.base == "none":
        return
    path, identity = join(config.out, FILE), _identity(config, prior_config)
    if exists(path) and _identity_of(path) == identity:
        return
    started = time.perf_counter()
    base, losses = _fit(config, prior_config, torch.device(device))
    tensors = {name: t.cpu().contiguous() for name, t in base.state_dict().items()}
    metadata = {IDENTITY: identity, "validation_loss": json.dumps(losses)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))
    logger.info(
        "base: %s with %d components, rank %d, validation loss %.4f, fitted in %.0f s",
        config.analytic.base,
        base.components,
        base.rank,
        min(losses.values()),
        time.perf_counter() - started,
    )


def load_base(config: TrainConfig, prior_config: PriorConfig) -> GaussianMixture | None:
    """The base in a run's folder; None for a run without one."""
    if config.analytic.base == "none":
        return None
    path = join(config.out, FILE)
    found = {f"{PREFIX}{name}": tensor for name, tensor in read_tensors(path).items()}
    return base_from_tensors(found, config.analytic.base, prior_config.d, path)


def _identity(config: TrainConfig, prior_config: PriorConfig) -> str:
    parts: dict[str, Any] = {
        **config.analytic.identity(),
        "store": prior_config.training.get("store"),
        "layers": prior_config.layers,
        "split": config.split.model_dump(),
        "seed": config.seed,
    }
    return hash_json(parts)


def _identity_of(path: str) -> str | None:
    try:
        header, _ = read_header(lambda start, stop: b"".join(iter_chunks(path, start, stop)))
    except ValueError as e:
        logger.warning("%s: damaged (%s); fitting the base again", path, e)
        return None
    return header.get("__metadata__", {}).get(IDENTITY)


def _fit(
    config: TrainConfig, prior_config: PriorConfig, device: torch.device
) -> tuple[GaussianMixture, dict[str, float]]:
    """Fit the base; return it with the validation loss of each candidate."""
    asked, seed = config.analytic, config.seed
    (layer,) = prior_config.layers
    store = ActivationStore.open(config.activations)
    normalizer = store_normalizer(store, prior_config).to(device)

    def rows(part: int, most: int) -> Tensor:
        found = store.select(layer, config.split, part, most, seed)
        check_finite(store, layer, found)
        return normalizer.normalize(found.activation.to(device))

    z, validation = rows(TRAIN, asked.base_rows), rows(VALIDATION, CHOICE_ROWS)
    if len(validation) == 0:
        raise UserError("base: no validation documents to choose its size on; change --split")
    logger.info("base: fitting %s on %d rows", asked.base, len(z))
    if asked.base == "gaussian":
        gaussian = fit_gaussian(z)
        return gaussian, {"1": flow_matching_loss(gaussian, validation)}
    if asked.base == "mixture":
        chosen = choose_diagonal(z, validation, asked.base_sizes, seed)
    else:
        chosen = choose_analysers(z, validation, asked.base_sizes, asked.base_ranks, seed)
    return chosen.mixture, chosen.losses
