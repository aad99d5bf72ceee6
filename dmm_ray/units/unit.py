"""Units of work: which consecutive documents each of them has (one shard per layer)."""

from __future__ import annotations

from typing import NamedTuple


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
