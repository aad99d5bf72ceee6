"""``dmm extract``: extracts activations from text into a store, with a Ray Data pool of truncated subject models."""

from __future__ import annotations

import logging
import time

from dmm_ray.errors import UserError
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.engine import too_many_failed
from dmm_ray.extraction.identity import comparable, subject_entry
from dmm_ray.extraction.job import Extraction
from dmm_ray.extraction.plan import CorpusSample, ExtractionPlan, choose_documents_per_unit
from dmm_ray.files import absolute, exists, join
from dmm_ray.precision import Precision, choose_precision
from dmm_ray.store.manifest import (
    DTYPES,
    MANIFEST,
    CorpusEntry,
    Manifest,
    read_manifest,
)
from dmm_ray.store.reader import file_sizes
from dmm_ray.subject import SubjectSource
from dmm_ray.text.corpus import Corpus
from dmm_ray.units.job import run_job
from dmm_ray.units.resources import actors_have_fast_bfloat16
from dmm_ray.units.resume import check_target
from dmm_ray.units.unit import count_units

logger = logging.getLogger(__name__)
DEFAULT_WINDOW = 2048


def extract(config: ExtractConfig) -> str:
    """Write or resume the store at ``config.out`` and return its folder.

    Raises:
        UserError: bad input, or the folder contains something else; nothing is written.
    """
    started = time.monotonic()
    out = absolute(config.out)
    check_target(out)
    source = config.subject.resolve()
    n_layers = source.check(config.layers, config.subject.block_path)
    window = choose_window(config.window, source.context)
    corpus = Corpus.scan(config.uris, config.text_field, config.text_separator)
    if len(corpus.problems) > config.max_failed_documents:
        errors = [problem.error or "" for problem in corpus.problems]
        raise UserError(too_many_failed(errors, config.max_failed_documents))
    sample = CorpusSample.draw(corpus, window, config.kept, config.seed, source.tokenizer)
    compute_dtype = choose_compute_dtype(config, out)
    manifest = make_manifest(config, compute_dtype, source, n_layers, corpus, window, sample)
    manifest = comparable(manifest, out)
    plan = ExtractionPlan(manifest, sample)
    plan.check_room(out, sum(file_sizes(out).values()))
    logger.info("%s", plan.line())
    return run_job(Extraction(config, out, plan, corpus), started)


def choose_window(window: int | None, context: int) -> int:
    """The window in tokens. Raises UserError if it exceeds the model's context."""
    if window is not None and window > context:
        raise UserError(f"window: {window} exceeds the model's context of {context} tokens")
    return window or min(DEFAULT_WINDOW, context)


def choose_compute_dtype(config: ExtractConfig, out: str) -> Precision:
    """The number format of the model's computation: as requested, else as in the store at ``out``, else by device."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    if exists(join(out, MANIFEST)):
        return read_manifest(out).compute_dtype
    if config.dtype == "float32":
        return "float32"
    fast = actors_have_fast_bfloat16(config.pool)
    chosen = choose_precision("auto", fast)
    logger.info("compute_dtype: %s, which the devices are fast in (--compute-dtype to choose)", chosen)
    return chosen


def make_manifest(
    config: ExtractConfig,
    compute_dtype: Precision,
    source: SubjectSource,
    n_layers: int,
    corpus: Corpus,
    window: int,
    sample: CorpusSample,
) -> Manifest:
    """The manifest of this extraction."""
    kept = config.kept
    row_bytes = source.d * DTYPES[config.dtype].itemsize
    per_unit = choose_documents_per_unit(
        config.rows_per_shard, sample, kept.most_rows(window), row_bytes, len(config.layers)
    )
    return Manifest(
        subject=subject_entry(source, config.subject.block_path, n_layers),
        tokenizer_hash=source.tokenizer_hash,
        layers=tuple(config.layers),
        dtype=config.dtype,
        compute_dtype=compute_dtype,
        d=source.d,
        corpus=CorpusEntry(
            uris=tuple(config.uris),
            hash=corpus.hash,
            documents=corpus.n_documents,
            text_field=config.text_field,
            separator=config.text_separator,
        ),
        window=window,
        kept=kept,
        exclude=config.exclude,
        covariance=config.covariance,
        seed=config.seed,
        documents_per_unit=per_unit,
        units=count_units(corpus.n_documents, per_unit),
    ).sealed()
