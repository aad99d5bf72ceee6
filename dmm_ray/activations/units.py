"""The plan of an extraction: which consecutive documents make which unit (one shard per layer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PADDING_SHARE = 0.05


class Unit(NamedTuple):
    """Documents ``first`` up to but without ``stop``."""

    unit: int
    first: int
    stop: int


def documents_per_unit(rows_per_shard: int, most_rows: int) -> int:
    """As many documents of at most ``most_rows`` rows as cannot exceed ``rows_per_shard``, one at least."""
    return max(1, rows_per_shard // most_rows)


def count_units(documents: int, per_unit: int) -> int:
    """How many units ``documents`` documents make."""
    return -(-documents // per_unit)


def unit_at(unit: int, documents: int, per_unit: int) -> Unit:
    """Unit number ``unit`` of a corpus of ``documents`` documents."""
    return Unit(unit, unit * per_unit, min((unit + 1) * per_unit, documents))


def packs(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences laid end to end: indices into ``lengths``, longest first, none of length 0.

    A pack holds at most ``batch_tokens`` tokens, or a single sequence.
    """
    groups: list[list[int]] = []
    free = 0
    for i in _longest_first(lengths):
        if lengths[i] > free:
            groups.append([])
            free = batch_tokens
        groups[-1].append(i)
        free -= lengths[i]
    return groups


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences padded to their longest: indices into ``lengths``, longest first, none of length 0.

    A batch holds at most ``batch_tokens`` tokens, of which at most 5 % are padding, or a single sequence.
    """
    groups: list[list[int]] = []
    tokens = 0
    for i in _longest_first(lengths):
        size = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else 0
        if groups and size <= batch_tokens and size - tokens - lengths[i] <= PADDING_SHARE * size:
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
