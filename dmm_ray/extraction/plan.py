"""Estimates the rows, bytes, shards and seconds of an extraction from a small sample, and checks the disk space."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmm_ray.errors import UserError
from dmm_ray.extraction.engine import Loading, load_forward, read_pieces
from dmm_ray.extraction.forward import Forward
from dmm_ray.extraction.pieces import DocumentPiece
from dmm_ray.files import filesystem, is_local
from dmm_ray.seeds import numpy_rng
from dmm_ray.store.manifest import Manifest
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document
from dmm_ray.units.unit import documents_per_unit

logger = logging.getLogger(__name__)
SAMPLE_SPOTS, SPOT_DOCUMENTS = 32, 8
SHARD_BYTES = 256 << 20
"""Approximate size of a shard if ``rows_per_shard`` is not given."""
UNIT_BYTES = 512 << 20
"""Approximate size of all layers of a unit together; an actor holds two or three units."""
SHARD_ROWS = 262144
LEAST_ROWS, LEAST_UNITS = 4096, 64
"""A small corpus is divided into this many units, unless units would have fewer rows than that."""
OVERSHOOT = 4
"""A unit never has more documents than could yield this many times the target number of rows."""
IDENTITY_BYTES = 4
"""Approximate compressed size of a row's doc, position and token_id."""
CALIBRATION_BATCHES = 3


@dataclass(frozen=True)
class CorpusSample:
    """A sample of documents, drawn by seed and split into pieces as the engine will do."""

    documents: int
    """Number of documents in the complete corpus."""
    pieces: tuple[DocumentPiece, ...]
    rows_per_document: float
    tokens_per_document: float

    @classmethod
    def draw(
        cls, corpus: Corpus, window: int, kept: TokenSelection, seed: int, tokenizer: Any
    ) -> CorpusSample:
        """Read and tokenise up to 256 documents, or all documents of a smaller corpus."""
        drawn = _draw(corpus, seed)
        found = read_pieces(drawn, window, kept, seed, tokenizer).pieces
        rows, tokens = sum(len(p.kept) for p in found), sum(len(p.ids) for p in found)
        return cls(corpus.n_documents, tuple(found), rows / len(drawn), tokens / len(drawn))

    @property
    def rows(self) -> int:
        """Estimated rows of the complete corpus."""
        return round(self.rows_per_document * self.documents)

    @property
    def tokens(self) -> int:
        """Estimated tokens of the complete corpus to run through the model."""
        return round(self.tokens_per_document * self.documents)


def _draw(corpus: Corpus, seed: int) -> list[Document]:
    """Runs of consecutive documents at seeded positions, in increasing order."""
    spots = -(-corpus.n_documents // SPOT_DOCUMENTS)
    chosen = np.arange(spots)
    if spots > SAMPLE_SPOTS:
        chosen = np.sort(numpy_rng(seed).choice(spots, SAMPLE_SPOTS, replace=False))
    return [
        document
        for spot in chosen.tolist()
        for document in corpus.read(spot * SPOT_DOCUMENTS, (spot + 1) * SPOT_DOCUMENTS)
    ]


def choose_documents_per_unit(
    rows_per_shard: int | None, sample: CorpusSample, most_rows: int, row_bytes: int, layers: int
) -> int:
    """The number of documents per unit: no shard over ``rows_per_shard`` rows, or shards of about 256 MB.

    Args:
        rows_per_shard: the maximum rows per shard, or None.
        sample: a sample of the corpus.
        most_rows: the maximum rows per document.
        row_bytes: the size of a row's activation in one layer.
        layers: the number of layers kept.
    """
    if rows_per_shard is not None:
        return documents_per_unit(rows_per_shard, most_rows)
    rows = min(SHARD_ROWS, SHARD_BYTES // row_bytes, UNIT_BYTES // (row_bytes * layers))
    rows = min(rows, max(LEAST_ROWS, sample.rows // LEAST_UNITS))
    expected = int(rows / max(sample.rows_per_document, 1.0))
    return max(1, min(expected, OVERSHOOT * documents_per_unit(rows, most_rows)))


@dataclass(frozen=True)
class ExtractionPlan:
    """The expected output of an extraction."""

    manifest: Manifest
    sample: CorpusSample

    @property
    def bytes(self) -> int:
        """Estimated size of the complete store."""
        m = self.manifest
        moments = 16 * m.d + (8 * m.d**2 if m.covariance else 0)
        per_layer = self.sample.rows * (m.bytes_per_row + IDENTITY_BYTES) + m.units * moments
        return len(m.layers) * per_layer

    def line(self) -> str:
        """One line for the log."""
        m = self.manifest
        return (
            f"plan: about {self.sample.rows:,} rows of {m.documents:,} documents in each of "
            f"{len(m.layers)} layers (d {m.d}, {m.dtype}), {self.bytes / 1e6:,.1f} MB "
            f"in {m.units * len(m.layers):,} shards"
        )

    def check_room(self, out: str, there: int) -> None:
        """Raise UserError if ``out`` is on a local disk without space for the bytes that are not ``there`` yet."""
        if not is_local(out):
            return
        folder = Path(filesystem(out)[1])
        while not folder.exists():
            folder = folder.parent
        disk = os.statvfs(folder)
        free, needed = disk.f_bavail * disk.f_frsize, self.bytes - there
        if needed > free and disk.f_blocks:  # file systems without blocks report a full disk on write
            raise UserError(
                f"out: {out} needs about {needed / 1e9:,.3g} GB more and its disk has {free / 1e9:,.3g} GB free; "
                "choose another --out, fewer layers or --tokens-per-doc"
            )


def calibrate(manifest: Manifest, loading: Loading, found: Sequence[DocumentPiece]) -> float:
    """Tokens per second of one actor, measured on a few batches after one warm-up batch."""
    threads = torch.get_num_threads()
    try:
        return _rate(load_forward(manifest, loading), loading.batch_tokens, found)
    finally:
        torch.set_num_threads(threads)


def _rate(forward: Forward, batch_tokens: int, found: Sequence[DocumentPiece]) -> float:
    wanted, chosen = (CALIBRATION_BATCHES + 1) * batch_tokens, list[DocumentPiece]()
    for piece in found:
        chosen.append(piece)
        wanted -= len(piece.ids)
        if wanted <= 0:
            break
    forward(chosen[: max(1, len(chosen) // (CALIBRATION_BATCHES + 1))])
    started = time.perf_counter()
    outputs = forward(chosen)
    for rows in outputs.rows.values():
        rows[:1].cpu()  # wait for the device
    return sum(len(piece.ids) for piece in chosen) / (time.perf_counter() - started)


def worth_calibrating(sample: CorpusSample, batch_tokens: int) -> bool:
    """Whether the job will take much longer than the calibration."""
    return sample.tokens > 8 * (CALIBRATION_BATCHES + 1) * batch_tokens
