"""``dmm verify``: every byte of a store against its records, and a sample of rows against the model."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.lock import LOCK
from dmm_ray.activations.manifest import (
    DTYPES,
    MANIFEST,
    STATISTICS,
    SUMMARY,
    Manifest,
    moments_name,
    read_manifest,
    read_moments,
    read_record,
    record_name,
)
from dmm_ray.activations.moments import Moments
from dmm_ray.activations.store import ActivationStore, file_sizes, length_problem
from dmm_ray.config import Config
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.files import absolute, join, sha256
from dmm_ray.subject import SubjectModel, SubjectSource

logger = logging.getLogger(__name__)
HASH_THREADS = 4
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}
"""Largest difference of a recomputed row, relative to its norm: other batches and machines round differently;
a wrong model, layer or token differs by about 1."""


class VerifyConfig(Config):
    """Check a store: hashes, missing and foreign files, statistics, a sample of rows computed again."""

    store: str
    """Folder or URI of the store."""
    sample_documents: int = Field(default=4, ge=0)
    """Documents, drawn by seed, whose rows are computed again where model and text are still there."""
    seed: int = 0
    """Of that draw."""
    model: str | None = None
    """Where the model is now; by default where the manifest says."""
    block_path: str | None = None
    """Dotted path of the decoder blocks; by default the manifest's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def verify(config: VerifyConfig) -> str:
    """Check the store; its folder.

    Raises:
        CheckFailed: something is wrong; each finding is logged, the message names the first.
        UserError: no store there.
    """
    uri = absolute(config.store)
    manifest = read_manifest(uri)
    problems = check_files(uri, manifest)
    if not problems:
        problems = check_statistics(uri, manifest)
    if not problems:
        problems = check_rows(config, ActivationStore.open(uri))
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        more = f" (and {len(problems) - 1} more findings, above)" if len(problems) > 1 else ""
        raise CheckFailed(f"{uri}: {problems[0]}{more}")
    logger.info("%s is whole: %d units, every file as recorded", uri, manifest.units)
    return uri


def check_files(uri: str, manifest: Manifest) -> list[str]:
    """What is wrong with the files: missing, foreign, of another length or hash, units without a record."""
    sizes = file_sizes(uri)
    problems, expected = [], {MANIFEST, STATISTICS, SUMMARY, LOCK}
    if manifest.sealed().config_hash != manifest.config_hash:
        problems.append(f"{MANIFEST}: its configuration does not match its config_hash: it was edited")
    problems += [
        f"{name}: missing; run the same `dmm extract` again"
        for name in (STATISTICS, SUMMARY)
        if name not in sizes
    ]
    hashes: dict[str, str] = {}
    for unit in range(manifest.units):
        name = record_name(unit)
        expected |= {name, moments_name(unit)}
        try:
            record = read_record(uri, unit)
        except UserError as e:
            problems.append(
                f"{name}: missing; run the same `dmm extract` again" if name not in sizes else str(e)
            )
            continue
        expected |= set(record.files)
        if problem := length_problem(record, sizes):
            problems.append(problem)
        hashes |= {n: entry.sha256 for n, entry in record.files.items() if sizes.get(n) == entry.bytes}
    problems += [f"{name}: foreign: no record lists it" for name in sorted(sizes.keys() - expected)]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, found in zip(hashes, pool.map(lambda n: sha256(join(uri, n)), hashes), strict=True):
            if found != hashes[name]:
                problems.append(f"{name}: its content is not what was written (SHA-256 differs)")
    return problems


def check_statistics(uri: str, manifest: Manifest) -> list[str]:
    """Whether ``statistics.safetensors`` is the merge of the units' moments."""
    total = {layer: Moments.empty(manifest.d) for layer in manifest.layers}
    for unit in range(manifest.units):
        part = read_moments(uri, moments_name(unit), manifest.layers)
        total = {layer: total[layer].merge(part[layer]) for layer in manifest.layers}
    stored = read_moments(uri, STATISTICS, manifest.layers)
    return [
        f"{STATISTICS}: layer {layer} is not the merge of the units' moments"
        for layer in manifest.layers
        if not (
            stored[layer].count == total[layer].count
            and np.array_equal(stored[layer].mean, total[layer].mean)
            and np.array_equal(stored[layer].m2, total[layer].m2)
        )
    ]


def check_rows(config: VerifyConfig, store: ActivationStore) -> list[str]:
    """Compute the rows of some documents again and compare; nothing where model or text are gone (logged)."""
    m = store.manifest
    documents = _sample(store, config.sample_documents, config.seed)
    if not documents:
        return []
    try:
        source = SubjectSource.resolve(
            config.model or m.subject.id, m.subject.revision, config.trust_remote_code
        )
        corpus = Corpus.scan(m.corpus.uris, m.corpus.text_field, m.corpus.separator)
    except UserError as e:
        logger.warning("no rows computed again: %s", e)
        return []
    if source.weights_hash != m.subject.weights_hash or source.tokenizer_hash != m.tokenizer_hash:
        return [f"{source.model_id}: its files are no longer those that the store was extracted with"]
    if corpus.hash != m.corpus.hash:
        return [f"{', '.join(m.corpus.uris)}: the text is no longer what the store was extracted from"]
    subject = SubjectModel.from_pretrained(
        source.model_id,
        layers=m.layers,
        dtype=DTYPES[m.compute_dtype],
        revision=m.subject.revision,
        block_path=config.block_path or m.subject.block_path,
        trust_remote_code=config.trust_remote_code,
    )
    problems = []
    for doc in documents:
        text = next(corpus.read(doc, doc + 1)).text or ""
        problems += check_document(store, subject, doc, text)
    logger.info("computed %d documents again: %d findings", len(documents), len(problems))
    return problems


def check_document(store: ActivationStore, subject: SubjectModel, doc: int, text: str) -> list[str]:
    """Compare the stored rows of one document, in every layer, with ``subject``'s."""
    m, skip = store.manifest, 0 if store.manifest.keep_first else 1
    ids = subject.tokenize([text], m.window)
    captured = subject.capture(*subject.pad(ids), m.layers)
    problems = []
    for layer in m.layers:
        rows = store.document(layer, doc)
        where = f"layer {layer}, document {doc}"
        if not np.array_equal(rows.token_id, np.array(ids[0][skip:], dtype=np.int32)):
            problems.append(f"{where}: stored tokens are not those of its text")
        elif (worst := _difference(rows.activation, captured[layer][0, skip:])) > TOLERANCE[m.dtype]:
            problems.append(f"{where}: stored rows differ from the model's by {worst:.2g} of their size")
    return problems


def _difference(stored: Tensor, computed: Tensor) -> float:
    """The largest norm of a row's difference relative to the row's norm, over finite rows."""
    a, b = stored.float(), computed.float().cpu()
    finite = torch.isfinite(a).all(1) & torch.isfinite(b).all(1)
    if not finite.any():
        return 0.0
    return float(((a - b)[finite].norm(dim=1) / b[finite].norm(dim=1).clamp_min(1e-12)).max())


def _sample(store: ActivationStore, count: int, seed: int) -> list[int]:
    """Documents that have rows, drawn by ``seed`` from as many row groups."""
    groups = store.row_groups(store.layers[0])
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(groups), size=min(count, len(groups)), replace=False)
    return sorted({int(rng.choice(store.documents(store.layers[0], groups[i]))) for i in chosen})
