"""``dmm verify``: checks every byte of a store against its records, and a sample of rows against the model."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmm_ray.config import Config
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.engine import read_pieces
from dmm_ray.extraction.identity import changed_part, warn_of_versions
from dmm_ray.extraction.pieces import RowTable
from dmm_ray.failures import ERRORS
from dmm_ray.files import absolute, join, sha256
from dmm_ray.parallel import in_order
from dmm_ray.precision import affordable_precision
from dmm_ray.provenance import SUMMARY
from dmm_ray.seeds import numpy_rng
from dmm_ray.store.info import moments_lines
from dmm_ray.store.manifest import (
    DTYPES,
    MANIFEST,
    STATISTICS,
    Manifest,
    Record,
    moments_name,
    read_manifest,
    read_moments,
    read_record,
    record_name,
    shard_name,
)
from dmm_ray.store.moments import Moments
from dmm_ray.store.reader import ActivationStore, file_sizes, length_problem
from dmm_ray.subject import SubjectModel
from dmm_ray.subject.config import ModelSource
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document
from dmm_ray.units.lock import LOCK
from dmm_ray.units.resume import units_ahead

logger = logging.getLogger(__name__)
HASH_THREADS = 4
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}
"""Maximum difference of a recomputed row, relative to its norm: rounding depends on the batch and the machine;
a wrong model, layer or token gives a difference of about 1."""


class VerifyConfig(Config):
    """Check a store: hashes, missing and unexpected files, statistics, and a sample of recomputed rows."""

    store: str
    """Folder or URI of the store."""
    sample_documents: int = Field(default=8, ge=0)
    """Number of documents, drawn by seed, whose rows are recomputed if model and text are still available."""
    seed: int = 0
    """Seed of that draw."""
    subject: ModelSource = ModelSource()
    """The language model, if it is no longer at its recorded location."""


def verify(config: VerifyConfig) -> str:
    """Check the store and return its folder.

    Raises:
        CheckFailed: something is wrong; every finding is logged, and the message names the first.
        UserError: there is no store.
    """
    uri = absolute(config.store)
    manifest = read_manifest(uri)
    problems = check_files(uri, manifest)
    if not problems and not manifest.is_table:
        problems = check_statistics(uri, manifest)
    if not problems and not manifest.derived:
        problems = check_rows(config, ActivationStore.open(uri))
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        more = f" (and {len(problems) - 1} more findings, above)" if len(problems) > 1 else ""
        raise CheckFailed(f"{uri}: {problems[0]}{more}")
    for line in [] if manifest.is_table else moments_lines(ActivationStore.open(uri)):
        logger.info("%s", line)
    logger.info("%s is intact: %d units, all files match their records", uri, manifest.units)
    return uri


def check_files(uri: str, manifest: Manifest) -> list[str]:
    """Problems with the files: missing, unexpected, wrong length or hash, and units without a record."""
    sizes = file_sizes(uri)
    whole = {SUMMARY} if manifest.is_table else {SUMMARY, STATISTICS}
    traces = {name for name in sizes if name.startswith(f"{ERRORS}/")}  # left by an unfinished run
    problems, expected = [], {MANIFEST, LOCK, *whole, *traces}
    if manifest.sealed().config_hash != manifest.config_hash:
        problems.append(f"{MANIFEST}: its configuration does not match its config_hash: it was edited")
    problems += [
        f"{name}: missing; run the same `dmm {manifest.verb}` again"
        for name in sorted(whole)
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
                f"{name}: missing; run the same `dmm {manifest.verb}` again" if name not in sizes else str(e)
            )
            continue
        expected |= set(record.files)
        if problem := length_problem(record, sizes):
            problems.append(problem)
        problems += _record_problems(record, manifest, unit)
        hashes |= {n: entry.sha256 for n, entry in record.files.items() if sizes.get(n) == entry.bytes}
    problems += [f"{name}: unexpected file: no record lists it" for name in sorted(sizes.keys() - expected)]
    return problems + _check_hashes(uri, hashes)


def _record_problems(record: Record, manifest: Manifest, unit: int) -> list[str]:
    """Problems with a record: it must belong to its unit and list the expected files and documents."""
    files = {shard_name(layer, unit) for layer in manifest.layers}
    files |= set() if manifest.is_table else {moments_name(unit)}
    first = unit * manifest.documents_per_unit
    if record.config_hash != manifest.config_hash:
        return [f"{record_name(unit)}: its unit was made with a different configuration"]
    if record.unit == unit and record.first_document == first and set(record.files) == files:
        return []
    return [
        f"{record_name(unit)}: is the record of unit {record.unit}, from document {record.first_document}"
    ]


def _check_hashes(uri: str, hashes: dict[str, str]) -> list[str]:
    """Files whose content is not what was written; names the original of a file that is a copy of another."""
    problems, owner = [], {digest: name for name, digest in hashes.items()}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, found in zip(hashes, pool.map(lambda n: sha256(join(uri, n)), hashes), strict=True):
            if found != hashes[name]:
                copy = f"; it is a copy of {owner[found]}" if found in owner else ""
                problems.append(f"{name}: its content is not what was written (SHA-256 differs){copy}")
    return problems


def check_statistics(uri: str, manifest: Manifest) -> list[str]:
    """Layers whose ``statistics.safetensors`` is not the merge of the units' moments."""
    total = {layer: Moments.empty(manifest.d, manifest.covariance) for layer in manifest.layers}
    units = iter(range(manifest.units))
    parts = in_order(lambda u: read_moments(uri, moments_name(u), manifest.layers), units, units_ahead(total))
    for part in parts:
        total = {layer: total[layer].merge(part[layer]) for layer in manifest.layers}
    stored = read_moments(uri, STATISTICS, manifest.layers)
    return [
        f"{STATISTICS}: layer {layer} is not the merge of the units' moments"
        for layer in manifest.layers
        if not (
            stored[layer].count == total[layer].count
            and np.array_equal(stored[layer].mean, total[layer].mean)
            and np.array_equal(stored[layer].m2, total[layer].m2)
            and _same(stored[layer].co, total[layer].co)
        )
    ]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def check_rows(config: VerifyConfig, store: ActivationStore) -> list[str]:
    """Recompute and compare the rows of some documents; skipped, with a warning, if model or text are unavailable."""
    m = store.manifest
    documents = _sample(store, config.sample_documents, config.seed)
    if not documents:
        return []
    asked = config.subject.recorded(m.subject.id, m.subject.revision, m.subject.block_path)
    try:
        source = asked.resolve()
        corpus = Corpus.scan(m.text.uris, m.text.text_field, m.text.separator)
    except UserError as e:
        logger.warning("no rows recomputed: %s", e)
        return []
    warn_of_versions(m.subject, store.uri)
    if changed := changed_part(source, m):
        return [f"{source.model_id}: {changed} is no longer what the store was extracted with"]
    if corpus.hash != m.text.hash:
        return [f"{', '.join(m.text.uris)}: the text is no longer what the store was extracted from"]
    subject = SubjectModel.from_pretrained(
        source.model_id,
        layers=m.layers,
        dtype=DTYPES[affordable_precision(m.compute_dtype, "cpu")],
        revision=asked.revision,
        block_path=asked.block_path,
        trust_remote_code=asked.trust_remote_code,
    )
    problems = []
    for doc in documents:
        problems += check_document(store, subject, next(corpus.read(doc, doc + 1)))
    logger.info("recomputed %d documents: %d findings", len(documents), len(problems))
    return problems


def check_document(store: ActivationStore, subject: SubjectModel, document: Document) -> list[str]:
    """Compare the stored rows of one document, in every layer, with ``subject`` run on it alone and unpacked; rows
    dropped by ``exclude`` are not reported as missing."""
    m = store.manifest
    found = read_pieces([document], m.window, m.kept, m.seed, subject.tokenizer).pieces
    captured = [subject.capture(*subject.pad([piece.ids]), m.layers) for piece in found]
    table = RowTable.of(found)
    problems = []
    for layer in m.layers:
        rows = store.document(layer, document.doc)
        where = f"layer {layer}, document {document.doc}"
        kept = np.isin(table.position, rows.position) if m.exclude else np.ones(table.rows, dtype=bool)
        rows_of = [c[layer][0, torch.from_numpy(p.kept)] for c, p in zip(captured, found, strict=True)]
        computed = torch.cat(rows_of)[torch.from_numpy(kept)]
        same = np.array_equal(rows.token_id, table.token_id[kept]) and np.array_equal(
            rows.position, table.position[kept]
        )
        if not same:
            problems.append(f"{where}: stored tokens do not match its text")
        elif (worst := _difference(rows.activation, computed)) > TOLERANCE[m.dtype]:
            problems.append(f"{where}: stored rows differ from the model's by {worst:.2g} of their norm")
    return problems


def _difference(stored: Tensor, computed: Tensor) -> float:
    """The largest difference of a row, as a norm relative to the row's norm, over finite rows."""
    a, b = stored.float(), computed.float().cpu()
    finite = torch.isfinite(a).all(1) & torch.isfinite(b).all(1)
    if not finite.any():
        return 0.0
    return float(((a - b)[finite].norm(dim=1) / b[finite].norm(dim=1).clamp_min(1e-12)).max())


def _sample(store: ActivationStore, count: int, seed: int) -> list[int]:
    """Documents with rows, drawn by ``seed`` from as many row groups as possible."""
    groups = store.row_groups(store.layers[0])
    rng = numpy_rng(seed)
    chosen = rng.choice(len(groups), size=min(count, len(groups)), replace=False)
    found: set[int] = set()
    for number, i in enumerate(chosen):
        docs = np.unique(store.documents(store.layers[0], groups[i]))
        share = -(-(count - len(found)) // (len(chosen) - number))
        found |= set(rng.choice(docs, size=min(share, len(docs)), replace=False).tolist())
    return sorted(found)
