"""Which rows of a document are kept, and how long documents are split, on token ids alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dmm_ray.extraction.pieces import DocumentPiece, RowTable, pieces
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.subject.encoding import Encoded

BOS, SEP = 100, 101


def document(n: int, bos: bool = True, suffix: int = 0) -> Encoded:
    """Tokens 0 .. n-1 between a BOS and closing special tokens."""
    ids = [BOS] * bos + list(range(n)) + [SEP] * suffix
    return Encoded(ids, len(ids), suffix)


def kept_of(
    encoded: Encoded, window: int = 10, seed: int = 0, doc: int = 3, **options: Any
) -> list[DocumentPiece]:
    return pieces(encoded, doc, window, TokenSelection(**options), seed, BOS)


def rows(found: list[DocumentPiece]) -> list[tuple[int, int]]:
    """(position, token) of every kept row."""
    return [
        (int(p), piece.ids[i]) for piece in found for i, p in zip(piece.kept, piece.position, strict=True)
    ]


def test_position_0_and_the_end_are_left_out_unless_asked_for() -> None:
    encoded = document(3, suffix=1)
    assert rows(kept_of(encoded)) == [(1, 0), (2, 1), (3, 2)]
    assert rows(kept_of(encoded, keep_first=True)) == [(0, BOS), (1, 0), (2, 1), (3, 2)]
    assert rows(kept_of(encoded, keep_special=True))[-1] == (4, SEP)
    assert kept_of(document(0)) == []
    assert rows(kept_of(document(1, bos=False))) == []
    assert rows(kept_of(document(1, bos=False), keep_first=True)) == [(0, 0)]


def test_position_filters() -> None:
    assert rows(kept_of(document(8), min_position=3, max_position=4)) == [(3, 2), (4, 3)]
    assert kept_of(document(2), min_position=5) == []
    with pytest.raises(ValidationError, match="no positions are left"):
        TokenSelection(min_position=5, max_position=4)


def test_last_and_drawn_tokens() -> None:
    assert rows(kept_of(document(8), tokens_per_doc="last")) == [(8, 7)]
    drawn = rows(kept_of(document(8), tokens_per_doc=3))
    assert len(drawn) == 3
    assert drawn == sorted(drawn)
    assert drawn == rows(kept_of(document(8), tokens_per_doc=3))
    assert any(rows(kept_of(document(8), tokens_per_doc=3, seed=s)) != drawn for s in range(1, 5))
    assert any(rows(kept_of(document(8), tokens_per_doc=3, doc=d)) != drawn for d in range(4, 9))
    assert len(rows(kept_of(document(2), tokens_per_doc=3))) == 2


def test_drawn_positions_are_uniform() -> None:
    counts = np.zeros(9)
    for doc in range(2000):
        for position, _ in rows(kept_of(document(8), tokens_per_doc=2, doc=doc)):
            counts[position] += 1
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 500, atol=100)


@given(
    n=st.integers(1, 60),
    window=st.integers(4, 20),
    bos=st.booleans(),
    suffix=st.integers(0, 1),
    first=st.booleans(),
)
def test_split_windows_hold_every_token_once(
    n: int, window: int, bos: bool, suffix: int, first: bool
) -> None:
    encoded = document(n, bos, suffix)
    found = kept_of(encoded, window, long_documents="split", keep_first=first, keep_special=True)
    assert all(len(piece.ids) <= window for piece in found)
    assert all((piece.ids[0] == BOS) == bos for piece in found)
    whole = dict(enumerate(encoded.ids))
    got = rows(found)
    assert got == sorted(set(got))
    assert all(whole[position] == token for position, token in got)
    missing = set(whole) - {position for position, _ in got}
    step = window - bos - suffix
    starts = {0} if len(encoded.ids) <= window else {bos + low for low in range(0, n, step)} | {0}
    assert missing == (set() if first else ({0} if bos else starts))


def test_short_documents_are_the_same_when_split() -> None:
    cut, split = kept_of(document(5)), kept_of(document(5), long_documents="split")
    assert rows(cut) == rows(split)
    assert len(split) == 1


def test_table_of_pieces() -> None:
    found = [
        *kept_of(document(3)),
        *kept_of(document(12), doc=5, long_documents="split", tokens_per_doc="last"),
    ]
    table = RowTable.of(found)
    assert table.starts.tolist() == [0, 3]
    assert table.doc.tolist() == [3, 3, 3, 5]
    assert table.position.tolist() == [1, 2, 3, 12]
    assert table.token_id.tolist() == [0, 1, 2, 11]
    assert (table.doc.dtype, table.position.dtype, table.token_id.dtype) == (np.int64, np.int32, np.int32)
    assert table.only(table.doc == 5).position.tolist() == [12]
    assert RowTable.of([]).rows == 0


def test_most_rows_of_a_document() -> None:
    assert TokenSelection().most_rows(10) == 9
    assert TokenSelection(keep_first=True).most_rows(10) == 10
    assert TokenSelection(tokens_per_doc=4).most_rows(10) == 4
    assert TokenSelection(tokens_per_doc="last").most_rows(10) == 1
    assert TokenSelection(min_position=3, max_position=5).most_rows(10) == 3
