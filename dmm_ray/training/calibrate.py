"""Calibrating a prior on a store: choosing its rows, and writing the file next to the weights."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import absolute
from dmm_ray.precision import PrecisionOption
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.calibrate import WIDTHS, calibrate
from dmm_ray.prior.calibration import Calibration
from dmm_ray.seeds import numpy_rng
from dmm_ray.store.match import check_finite, check_fits
from dmm_ray.store.reader import ActivationStore, RowGroup, Rows
from dmm_ray.store.split import VALIDATION, Split, hash_documents

logger = logging.getLogger(__name__)
BLOCK = max(WIDTHS)
"""Rows are drawn in blocks of this many consecutive tokens of a document."""
CANDIDATES = 16
"""Blocks are drawn from this many times the requested rows, taken from row groups drawn by the seed."""
BISECTIONS = 60
FEW_ROWS = 256
"""Below this many rows, a warning says that the percentiles are rough."""


class Places(NamedTuple):
    """The places of n rows in a store, the same for every layer."""

    groups: list[RowGroup]
    group: np.ndarray
    """(n,) index into ``groups``, ascending."""
    row: np.ndarray
    """(n,) index into the group, ascending within each."""
    doc: np.ndarray
    """(n,) int64."""
    position: np.ndarray
    """(n,) int64."""

    def only(self, mask: np.ndarray) -> Places:
        """The rows where ``mask`` is true."""
        return Places(self.groups, *(column[mask] for column in self[1:]))


def calibrate_prior_on_store(
    folder: str,
    store: str,
    rows: int = 2048,
    seed: int = 0,
    device: str = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Calibrate a prior with :func:`calibration_of` and write ``calibration.safetensors`` into its folder.

    Args:
        folder: the prior's folder.
        store: folder or URI of activations.
        rows: approximate number of rows per layer.
        seed: seed for drawing rows and for the scores' noise.
        device: cpu, cuda or auto.
        precision: precision of the network's products.

    Raises:
        UserError: no such folder or store, or as for :func:`calibration_of`.
    """
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    prior = ActivationPrior.from_pretrained(folder, device=place, precision=precision)
    calibration_of(prior, ActivationStore.open(store), rows, seed).save(absolute(folder))


def calibration_of(
    prior: ActivationPrior, store: ActivationStore, rows: int = 2048, seed: int = 0
) -> Calibration:
    """Calibrate every layer that a prior and a store of natural activations share.

    Rows come from validation documents, or from all documents if the prior was not trained on a split of a store.

    Raises:
        UserError: a store that does not match the prior, no validation documents, or a row with NaN or Inf.
    """
    layers = check_fits(prior.config, store, same_model=True)
    split = Split.model_validate(prior.config.split) if prior.config.split else None
    places, weights = draw(candidates(store, layers[0], split, CANDIDATES * rows, seed), rows, seed)
    ids = np.stack([places.doc, places.position], axis=1)
    found = Calibration(prior.d, {})
    for layer in layers:
        found |= calibrate(prior, read(store, layer, places), ids, layer=layer, weights=weights, seed=seed)
    logger.info("calibrated on %d rows of %d documents", len(ids), len(np.unique(places.doc)))
    return found


def candidates(store: ActivationStore, layer: int, split: Split | None, rows: int, seed: int) -> Places:
    """The validation rows (all rows without a split) of row groups in seeded order, until there are ``rows``.

    Raises:
        UserError: there are none.
    """
    every = store.row_groups(layer)
    groups: list[RowGroup] = []
    found, count = [], 0
    for i in numpy_rng(seed).permutation(len(every)):
        seen = store.read(layer, every[i], ("doc", "position"))
        inside = np.flatnonzero(
            np.ones(len(seen.doc), bool) if split is None else split.of(seen.doc) == VALIDATION
        )
        found.append(
            (
                np.full(len(inside), len(groups)),
                inside,
                seen.doc[inside],
                seen.position[inside].astype(np.int64),
            )
        )
        groups.append(every[i])
        count += len(inside)
        if count >= rows:
            break
    if not count:
        raise UserError(
            f"activations: {store.uri} has no validation documents to calibrate on; extract more text or give the "
            "split a larger validation part"
        )
    return Places(groups, *(np.concatenate(column) for column in zip(*found, strict=True)))


def draw(places: Places, rows: int, seed: int) -> tuple[Places, np.ndarray]:
    """Draw about ``rows`` of the rows, in runs of up to 32 consecutive tokens, with their weights (n,) float64.

    Documents are cut into blocks of 32 tokens, each document at its own offset. A block that ends at position p is
    drawn with probability proportional to 1 / (32 + p), at most 1, so that every power of two of positions is covered.
    Its rows' weight is the inverse of that probability (Horvitz and Thompson 1952): how many rows each stands for.
    """
    shift = (hash_documents(places.doc, seed) % np.uint64(BLOCK)).astype(np.int64)
    place = (places.position + shift) // BLOCK
    _, block = np.unique(places.doc * (place.max() + 1) + place, return_inverse=True)
    end = np.zeros(block.max() + 1, dtype=np.int64)
    np.maximum.at(end, block, places.position)
    chance = _chances(1.0 / (BLOCK + end), np.bincount(block), rows)
    taken = _systematic(chance, seed)[block]
    if taken.sum() < FEW_ROWS:
        logger.warning("calibration: only %d rows, the percentiles are rough", taken.sum())
    return places.only(taken), 1.0 / chance[block][taken]


def read(store: ActivationStore, layer: int, places: Places) -> Tensor:
    """Activations (n, d) of one layer, in the stored dtype. Raises UserError for a row that contains NaN or Inf."""
    parts = []
    for i, group in enumerate(places.groups):
        index = places.row[places.group == i]
        if len(index):
            found = store.read(layer, group)
            at = torch.from_numpy(index)
            rows = Rows(found.activation[at], found.doc[index], found.position[index], found.token_id[index])
            check_finite(store, layer, rows)
            parts.append(rows.activation)
    return torch.cat(parts)


def _chances(rate: np.ndarray, counts: np.ndarray, rows: int) -> np.ndarray:
    """``min(1, c rate)`` with c such that blocks of ``counts`` rows yield ``rows`` on average; 1 if all are needed."""
    low, high = 0.0, 1.0 / rate.min()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = (counts * np.minimum(1.0, middle * rate)).sum() > rows
        low, high = (low, middle) if too_many else (middle, high)
    return np.minimum(1.0, high * rate)


def _systematic(chance: np.ndarray, seed: int) -> np.ndarray:
    """Mask of units drawn by systematic sampling in random order (Madow 1949), as many as the chances add up to."""
    rng = numpy_rng(seed)
    order = rng.permutation(len(chance))
    passed = np.floor(np.cumsum(chance[order]) + rng.random())
    taken = np.empty(len(chance), dtype=bool)
    taken[order] = np.diff(passed, prepend=0.0) > 0
    return taken
