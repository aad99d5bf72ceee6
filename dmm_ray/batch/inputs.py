"""What a job over a store reads: the prior, the store, the choice of rows; all checked first."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dmm_ray.batch.config import JobConfig, StoreJobConfig
from dmm_ray.batch.engine import hash_prior
from dmm_ray.batch.selection import StoreRows, expected_rows, select, suspects
from dmm_ray.errors import UserError
from dmm_ray.extraction.config import ExtractConfig, ExtractedModel
from dmm_ray.extraction.extract import extract
from dmm_ray.files import absolute
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.folder import resolve
from dmm_ray.prior.rows import PriorRows as PriorRows
from dmm_ray.store.match import check_fits
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.units.resume import check_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchInputs:
    """A prior and the rows of a store that it is asked about."""

    prior: str
    """Where the prior is, as actors find it."""
    prior_hash: str
    layer: int
    store: ActivationStore
    rows: StoreRows
    expected: int
    """How many rows there are, about."""


def open_prior(config: JobConfig) -> tuple[ActivationPrior, int]:
    """The prior, on the CPU, and the layer to work on. Raises UserError where there is none such."""
    prior = ActivationPrior.from_pretrained(config.prior)
    return prior, prior.layers[prior.layer_index(config.layer)]


def locate(prior: str) -> str:
    """Where a prior is, as other processes find it: local folders made absolute, hub ids unchanged."""
    return absolute(prior) if resolve(prior) == prior else prior


def load_inputs(config: StoreJobConfig, prior: ActivationPrior, layer: int) -> BatchInputs:
    """Open and check all; extract the activations first where text is given.

    Raises:
        UserError: no such store or text, one that the prior does not fit, no rows of the part, a row that contains
            NaN or Inf.
    """
    out = absolute(config.out)
    check_target(out)
    uri = absolute(config.activations or f"{out.rstrip('/')}-activations")
    if uri.rstrip("/") == out.rstrip("/"):
        raise UserError(f"out: {out} is the store that is read; choose another --out")
    if config.text is not None:
        extract_first(config, prior, layer, uri)
    store = ActivationStore.open(uri)
    check_fits(prior.config, store, layer)
    selection = select(store, layer, prior.config, config.split, config.rows, config.seed)
    rows = StoreRows(store, layer, selection)
    check_rows(prior, rows)
    return BatchInputs(
        locate(config.prior),
        hash_prior(prior.config, prior.state_dict()),
        layer,
        store,
        rows,
        expected_rows(store, selection, config.rows),
    )


def extract_first(config: StoreJobConfig, prior: ActivationPrior, layer: int, store: str) -> None:
    """Write, or finish, the store of the text, of the tokens that the prior was trained on.

    Raises:
        UserError: no model is known, or as ``dmm extract``.
    """
    known = prior.config.subject
    subject = config.subject.recorded(known.get("id"), known.get("revision"), known.get("block_path"))
    if subject.model is None:
        raise UserError("model: the prior does not say which model it is of; give --model")
    logger.info("extracting layer %d of %s into %s", layer, subject.model, store)
    trained = prior.config.training
    extract(
        ExtractConfig(
            subject=ExtractedModel(**subject.model_dump()),
            text=config.text or [],
            layers=[layer],
            out=store,
            window=config.window or trained.get("window"),
            kept=TokenSelection.model_validate(trained.get("kept", {})),
            pool=config.pool,
        )
    )


def check_rows(prior: ActivationPrior, source: StoreRows) -> None:
    """Warn if the first rows do not fit the prior's normaliser.

    Raises:
        UserError: a chosen row contains NaN or Inf; the message names it.
    """
    store, layer = source.store, source.layer
    for documents in suspects(store, layer):
        source.rows(documents)  # checks them; the rows of other documents are checked when they are read
    first = store.read(layer, store.row_groups(layer)[0], ("activation",)).activation
    finite = first[torch.isfinite(first).all(1)]
    if len(finite):
        row = prior.layer_index(layer)
        for _ in PriorRows(finite, None, prior.config, prior.normalizer, row).pieces(1):
            pass  # the warning comes at the end
