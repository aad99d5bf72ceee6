"""``dmm score``, ``denoise``, ``encode`` and ``sample``: check all inputs, then run the units."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal, TypeVar

from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, JobConfig, SampleConfig, ScoreConfig
from dmm_ray.batch.engine import hash_calibration, hash_prior
from dmm_ray.batch.inputs import BatchInputs, load_inputs, locate, open_prior
from dmm_ray.batch.job import PriorJob, arguments_of, settle_precision
from dmm_ray.batch.operations import (
    BatchOperation,
    DenoiseOperation,
    EncodeOperation,
    SampleOperation,
    ScoreOperation,
    hidden_units,
)
from dmm_ray.batch.selection import Draws
from dmm_ray.files import absolute
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.likelihood import EXACT_TRACE_MAX_D, check_probes
from dmm_ray.store.manifest import (
    DTYPES,
    ROW_GROUP_ROWS,
    Derivation,
    DtypeName,
    Manifest,
    SubjectEntry,
)
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.units.job import run_job
from dmm_ray.units.resume import check_target
from dmm_ray.units.unit import count_units

logger = logging.getLogger(__name__)
UNIT_ROWS, UNIT_BYTES = 16384, 256 << 20
"""Maximum size of a unit's results if ``rows_per_shard`` is not given."""
LEAST_ROWS, LEAST_UNITS = 1024, 16
"""Few rows are divided into this many units, unless units would have fewer rows than that."""
NAME_BYTES = 16
C = TypeVar("C", bound=JobConfig)


def score(config: ScoreConfig) -> str:
    """Write a table of scores and return its folder. Raises UserError for bad input, before writing anything."""
    started = time.monotonic()
    prior, layer = open_prior(config)
    if not config.proxy:
        check_probes(config.probes, prior.d, EXACT_TRACE_MAX_D)
    inputs = load_inputs(config, prior, layer)
    _warn_of_calibration(config, prior, layer)
    config = _settled(config)
    operation = ScoreOperation(config, layer)
    arguments = arguments_of(config) | {"calibration": hash_calibration(config.prior)}
    row_bytes = 4 * len(operation.columns)
    manifest = store_manifest("score", config, inputs, operation, arguments, row_bytes)
    return run_job(PriorJob(config, manifest, inputs.rows, operation), started)


def denoise(config: DenoiseConfig) -> str:
    """Write a store of denoised activations and return its folder. Raises UserError as :func:`score`."""
    started = time.monotonic()
    prior, layer = open_prior(config)
    inputs = load_inputs(config, prior, layer)
    config = _settled(config)
    dtype = config.dtype or inputs.store.manifest.dtype
    operation = DenoiseOperation(config, layer, prior.d, dtype)
    arguments = arguments_of(config) | {"dtype": dtype}
    row_bytes = prior.d * DTYPES[dtype].itemsize
    manifest = store_manifest("denoise", config, inputs, operation, arguments, row_bytes, dtype)
    return run_job(PriorJob(config, manifest, inputs.rows, operation), started)


def encode(config: EncodeConfig) -> str:
    """Write a table of hidden units and return its folder. Raises UserError as :func:`score`."""
    started = time.monotonic()
    prior, layer = open_prior(config)
    there, kept = hidden_units(config, prior.config)
    inputs = load_inputs(config, prior, layer)
    config = _settled(config)
    operation = EncodeOperation(config, layer, there, kept)
    row_bytes = kept * (2 if config.dtype == "float16" else 4)
    manifest = store_manifest("encode", config, inputs, operation, arguments_of(config), row_bytes)
    return run_job(PriorJob(config, manifest, inputs.rows, operation), started)


def sample(config: SampleConfig) -> str:
    """Write a store of sampled activations and return its folder. Raises UserError as :func:`score`."""
    started = time.monotonic()
    prior, layer = open_prior(config)
    check_target(absolute(config.out))
    config = _settled(config)
    operation = SampleOperation(config, layer, prior.d, config.dtype)
    manifest = sample_manifest(config, prior, layer)
    return run_job(PriorJob(config, manifest, Draws(), operation), started)


def _settled(config: C) -> C:
    return config.model_copy(update={"precision": settle_precision(config)})


def store_manifest(
    verb: Literal["score", "denoise", "encode"],
    config: JobConfig,
    inputs: BatchInputs,
    operation: BatchOperation,
    arguments: dict[str, Any],
    row_bytes: int,
    dtype: DtypeName | None = None,
) -> Manifest:
    """The manifest of results for a store's rows: that of the store, plus the operation applied to it."""
    source = inputs.store.manifest
    per_unit = documents_per_unit(config, inputs.expected, source.documents, row_bytes + NAME_BYTES)
    changes = {
        "layers": (inputs.layer,),
        "dtype": dtype or source.dtype,
        "row_group_rows": ROW_GROUP_ROWS,
        "documents_per_unit": per_unit,
        "units": count_units(source.documents, per_unit),
        "derived": Derivation(
            verb=verb,
            prior=inputs.prior,
            prior_hash=inputs.prior_hash,
            activations=inputs.store.uri,
            activations_hash=source.config_hash,
            arguments=arguments,
            columns=operation.columns,
        ),
    }
    return source.model_copy(update=changes).sealed()


def sample_manifest(config: SampleConfig, prior: ActivationPrior, layer: int) -> Manifest:
    """The manifest of sampled activations: the prior's subject, and no text."""
    known = prior.config.subject
    subject = SubjectEntry(
        id=known.get("id", "unknown"),
        revision=known.get("revision"),
        weights_hash=known.get("weights_hash", ""),
        files=known.get("files", {}),
        block_path=known.get("block_path"),
        n_layers=prior.config.subject_layers,
        context=known.get("context", 0),
        resolved=known.get("resolved"),
    )
    row_bytes = prior.d * DTYPES[config.dtype].itemsize
    per_unit = documents_per_unit(config, config.n, config.n, row_bytes + NAME_BYTES)
    return Manifest(
        subject=subject, tokenizer_hash=known.get("tokenizer_hash", ""), layers=(layer,), dtype=config.dtype,
        compute_dtype=settle_precision(config), d=prior.d, window=1, kept=TokenSelection(keep_first=True),
        exclude=(), covariance=False, corpus=None, seed=config.seed,
        documents_per_unit=per_unit, units=count_units(config.n, per_unit),
        derived=Derivation(
            verb="sample", prior=locate(config.prior), prior_hash=hash_prior(prior.config, prior.state_dict()),
            activations=None, activations_hash=None, arguments=arguments_of(config),
        ),
    ).sealed()  # fmt: skip


def documents_per_unit(config: JobConfig, rows: int, documents: int, row_bytes: int) -> int:
    """The number of documents per unit, given ``documents`` documents with about ``rows`` rows in total."""
    most = config.rows_per_shard
    if most is None:
        most = min(UNIT_ROWS, UNIT_BYTES // row_bytes, max(LEAST_ROWS, rows // LEAST_UNITS))
    return max(1, min(documents, most * documents // rows))


def _warn_of_calibration(config: ScoreConfig, prior: ActivationPrior, layer: int) -> None:
    """Warn about columns that will be null."""
    found = prior.calibration
    if found is None or layer not in found.layers:
        logger.warning("score: %s is not calibrated for layer %d; percentiles are null", config.prior, layer)
    elif config.window_tokens and config.window_tokens not in found.widths and not config.proxy:
        logger.warning(
            "window_tokens: calibrated for %s, not %d; window percentiles are null",
            ", ".join(map(str, found.widths)),
            config.window_tokens,
        )
