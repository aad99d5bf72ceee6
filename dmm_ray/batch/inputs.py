"""Opens and checks the inputs of a job over a store: the prior, the store and the selection of rows."""

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
    """A prior and the rows of a store to apply it to."""

    prior: str
    """Location of the prior, valid for the actors."""
    prior_hash: str
    layer: int
    store: ActivationStore
    rows: StoreRows
    expected: int
    """Approximate number of rows."""


def open_prior(config: JobConfig) -> tuple[ActivationPrior, int]:
    """The prior, on the CPU, and the layer to work on. Raises UserError if either does not exist."""
    prior = ActivationPrior.from_pretrained(config.prior)
    return prior, prior.layers[prior.layer_index(config.layer)]


def locate(prior: str) -> str:
    """The location of a prior, valid in other processes: local folders made absolute, hub ids unchanged."""
    return absolute(prior) if resolve(prior) == prior else prior


def load_inputs(config: StoreJobConfig, prior: ActivationPrior, layer: int) -> BatchInputs:
    """Open and check all inputs; extract the activations first if text is given.

    Raises:
        UserError: the store or text is missing or does not fit the prior, the part has no rows, or a row contains
            NaN or Inf.
    """
    out = absolute(config.out)
    check_target(out)
    uri = absolute(config.activations or f"{out.rstrip('/')}-activations")
    if uri.rstrip("/") == out.rstrip("/"):
        raise UserError(f"out: {out} is the input store; choose another --out")
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
    """Write or resume the store for the text, with the same selection of tokens that the prior was trained on.

    Raises:
        UserError: the model is unknown, or as for ``dmm extract``.
    """
    known = prior.config.subject
    subject = config.subject.recorded(known.get("id"), known.get("revision"), known.get("block_path"))
    if subject.model is None:
        raise UserError("model: the prior does not record the model it was trained on; give --model")
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
        UserError: a selected row contains NaN or Inf; the message names it.
    """
    store, layer = source.store, source.layer
    for documents in suspects(store, layer):
        source.rows(documents)  # checks them; rows of other documents are checked when the actors read them
    first = store.read(layer, store.row_groups(layer)[0], ("activation",)).activation
    finite = first[torch.isfinite(first).all(1)]
    if len(finite):
        row = prior.layer_index(layer)
        for _ in PriorRows(finite, None, prior.config, prior.normalizer, row).pieces(1):
            pass  # the warning is logged at the end of the iteration
