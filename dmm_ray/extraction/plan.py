"""Before an extraction: how many rows, bytes, shards and seconds it will take, from a small sample; is there room?"""

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
"""Of a shard, about, where ``rows_per_shard`` is not given."""
UNIT_BYTES = 512 << 20
"""Of all layers of a unit together, about; an actor holds two units or three."""
SHARD_ROWS = 262144
LEAST_ROWS, LEAST_UNITS = 4096, 64
"""A small corpus makes this many units, unless they would be smaller than that."""
OVERSHOOT = 4
"""A unit never holds more documents than could make this many times the rows aimed at."""
IDENTITY_BYTES = 4
"""Of doc, position and token_id of a row, compressed, about."""
CALIBRATION_BATCHES = 3


@dataclass(frozen=True)
class CorpusSample:
    """Some documents, drawn by seed, as the engine will see them."""

    documents: int
    """Of the whole corpus."""
    pieces: tuple[DocumentPiece, ...]
    rows_per_document: float
    tokens_per_document: float

    @classmethod
    def draw(
        cls, corpus: Corpus, window: int, kept: TokenSelection, seed: int, tokenizer: Any
    ) -> CorpusSample:
        """Read and tokenise at most 256 documents: all of a smaller corpus."""
        drawn = _draw(corpus, seed)
        found = read_pieces(drawn, window, kept, seed, tokenizer).pieces
        rows, tokens = sum(len(p.kept) for p in found), sum(len(p.ids) for p in found)
        return cls(corpus.n_documents, tuple(found), rows / len(drawn), tokens / len(drawn))

    @property
    def rows(self) -> int:
        """Rows of the whole corpus, about."""
        return round(self.rows_per_document * self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of the whole corpus that go through the model, about."""
        return round(self.tokens_per_document * self.documents)


def _draw(corpus: Corpus, seed: int) -> list[Document]:
    """Runs of consecutive documents at seeded places, in rising order."""
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
    """How many documents make a unit: no shard over ``rows_per_shard``, or shards of about 256 MB.

    Args:
        rows_per_shard: the most rows of a shard, or None.
        sample: of the corpus.
        most_rows: that a document can have.
        row_bytes: of a row's activation in one layer.
        layers: how many are kept.
    """
    if rows_per_shard is not None:
        return documents_per_unit(rows_per_shard, most_rows)
    rows = min(SHARD_ROWS, SHARD_BYTES // row_bytes, UNIT_BYTES // (row_bytes * layers))
    rows = min(rows, max(LEAST_ROWS, sample.rows // LEAST_UNITS))
    expected = int(rows / max(sample.rows_per_document, 1.0))
    return max(1, min(expected, OVERSHOOT * documents_per_unit(rows, most_rows)))


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction will write."""

    manifest: Manifest
    sample: CorpusSample

    @property
    def bytes(self) -> int:
        """Of the whole store, about."""
        m = self.manifest
        moments = 16 * m.d + (8 * m.d**2 if m.covariance else 0)
        per_layer = self.sample.rows * (m.bytes_per_row + IDENTITY_BYTES) + m.units * moments
        return len(m.layers) * per_layer

    def line(self) -> str:
        """What is planned, for the log."""
        m = self.manifest
        return (
            f"plan: about {self.sample.rows:,} rows of {m.documents:,} documents in each of "
            f"{len(m.layers)} layers (d {m.d}, {m.dtype}), {self.bytes / 1e6:,.1f} MB "
            f"in {m.units * len(m.layers):,} shards"
        )

    def check_room(self, out: str, there: int) -> None:
        """Raise UserError where ``out`` is local and its disk lacks room for what is not ``there`` yet, in bytes."""
        if not is_local(out):
            return
        folder = Path(filesystem(out)[1])
        while not folder.exists():
            folder = folder.parent
        disk = os.statvfs(folder)
        free, needed = disk.f_bavail * disk.f_frsize, self.bytes - there
        if needed > free and disk.f_blocks:  # file systems without blocks refuse writing by themselves
            raise UserError(
                f"out: {out} needs about {needed / 1e9:,.3g} GB more and its disk has {free / 1e9:,.3g} GB free; "
                "choose another --out, fewer layers or --tokens-per-doc"
            )


def calibrate(manifest: Manifest, loading: Loading, found: Sequence[DocumentPiece]) -> float:
    """Tokens per second of one actor, from a few batches after one that warms up."""
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
    """Whether the job is much longer than its calibration."""
    return sample.tokens > 8 * (CALIBRATION_BATCHES + 1) * batch_tokens
