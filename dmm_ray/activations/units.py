"""The plan of an extraction: which consecutive documents make which unit (one shard per layer)."""

from __future__ import annotations

from typing import NamedTuple


class Unit(NamedTuple):
    """Documents ``first`` up to but without ``stop``."""

    unit: int
    first: int
    stop: int


def documents_per_unit(rows_per_shard: int, window: int) -> int:
    """As many documents as cannot exceed ``rows_per_shard`` rows, one at least."""
    return max(1, rows_per_shard // (window - 1))


def count_units(documents: int, per_unit: int) -> int:
    """How many units ``documents`` documents make."""
    return -(-documents // per_unit)


def unit_at(unit: int, documents: int, per_unit: int) -> Unit:
    """Unit number ``unit`` of a corpus of ``documents`` documents."""
    return Unit(unit, unit * per_unit, min((unit + 1) * per_unit, documents))


def batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Group documents of alike length: indices into ``lengths``, longest first, none of length 0.

    A group padded to its longest holds at most ``batch_tokens`` tokens, or a single document.
    """
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
