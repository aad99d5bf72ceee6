"""Splits documents into the pieces that are run through the model, and pieces into the rows of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dmm_ray.store.split import hash_documents
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.subject.encoding import Encoded


class DocumentPiece(NamedTuple):
    """A sequence of tokens that is run through the model independently, and the rows to keep from it."""

    doc: int
    ids: Sequence[int]
    kept: np.ndarray
    """Indices into ``ids``, int64, increasing."""
    position: np.ndarray
    """Their positions in the document, int64."""


def pieces(
    encoded: Encoded, doc: int, window: int, kept: TokenSelection, seed: int, bos: int | None
) -> list[DocumentPiece]:
    """The pieces of a document with at least one row to keep, in order.

    Args:
        encoded: its tokens, already truncated to ``window`` unless long documents are split.
        doc: its number.
        window: maximum tokens per piece.
        kept: which tokens to keep.
        seed: seed for drawing tokens if only some are kept.
        bos: the id that every window begins with if the document does.
    """
    whole = _windows(encoded, doc, window, kept, bos)
    inside = [_filtered(piece, kept) for piece in whole]
    if kept.tokens_per_doc != "all":
        inside = _drawn(inside, kept.tokens_per_doc, seed)
    return [piece for piece in inside if len(piece.kept)]


def _windows(
    encoded: Encoded, doc: int, window: int, kept: TokenSelection, bos: int | None
) -> list[DocumentPiece]:
    """The document, whole or in windows, with all rows except those dropped by ``keep_first`` and ``keep_special``."""
    ids, suffix = encoded.ids, encoded.suffix
    first, last = 0 if kept.keep_first else 1, 0 if kept.keep_special else suffix
    if len(ids) <= window:
        index = np.arange(first, max(first, len(ids) - last))
        return [DocumentPiece(doc, ids, index, index)]
    prefix = int(ids[0] == bos)
    body, tail = ids[prefix : len(ids) - suffix], ids[len(ids) - suffix :]
    step = window - prefix - suffix
    found = []
    for low in range(0, len(body), step):
        tokens = [*ids[:prefix], *body[low : low + step], *tail]
        ends = low + step >= len(body)
        skip = first if low == 0 else max(first, prefix)
        index = np.arange(skip, max(skip, len(tokens) - (last if ends else suffix)))
        found.append(DocumentPiece(doc, tokens, index, index + low))
    return found


def _filtered(piece: DocumentPiece, kept: TokenSelection) -> DocumentPiece:
    high = np.inf if kept.max_position is None else kept.max_position
    inside = (piece.position >= kept.min_position) & (piece.position <= high)
    return piece._replace(kept=piece.kept[inside], position=piece.position[inside])


def _drawn(found: list[DocumentPiece], tokens: int | str, seed: int) -> list[DocumentPiece]:
    """The last row of the document, or the rows with the smallest hashes of (seed, document, position)."""
    position = np.concatenate([piece.position for piece in found])
    if tokens == "last":
        chosen = position[-1:]
    else:
        doc_seed = int(hash_documents(np.array([found[0].doc]), seed)[0])
        order = np.argsort(hash_documents(position, doc_seed), kind="stable")
        chosen = position[order[: int(tokens)]]
    inside = [np.isin(piece.position, chosen) for piece in found]
    return [
        p._replace(kept=p.kept[mask], position=p.position[mask])
        for p, mask in zip(found, inside, strict=True)
    ]


@dataclass(frozen=True)
class RowTable:
    """The rows of a list of pieces: where each piece's rows start, and the identity columns."""

    starts: np.ndarray
    """(pieces,) int64: index of each piece's first row."""
    doc: np.ndarray
    """(rows,) int64."""
    position: np.ndarray
    """(rows,) int32."""
    token_id: np.ndarray
    """(rows,) int32."""

    @classmethod
    def of(cls, found: Sequence[DocumentPiece]) -> RowTable:
        """Rows in the order of the pieces."""
        counts = np.array([len(piece.kept) for piece in found], dtype=np.int64)
        doc = np.repeat(np.array([piece.doc for piece in found], dtype=np.int64), counts)
        position = np.concatenate([np.empty(0, np.int64), *(piece.position for piece in found)])
        token_id = [np.asarray(piece.ids, dtype=np.int32)[piece.kept] for piece in found]
        return cls(
            np.cumsum(counts) - counts,
            doc,
            position.astype(np.int32),
            np.concatenate([np.empty(0, np.int32), *token_id]),
        )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.doc)

    def only(self, mask: np.ndarray) -> RowTable:
        """The rows where ``mask`` is true; ``starts`` still refers to the full table."""
        return RowTable(self.starts, self.doc[mask], self.position[mask], self.token_id[mask])
