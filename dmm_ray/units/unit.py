"""Units of work: each is a run of consecutive documents and makes one shard per layer."""

from __future__ import annotations

from typing import NamedTuple


class Unit(NamedTuple):
    """Documents ``first`` up to but excluding ``stop``."""

    unit: int
    first: int
    stop: int


def documents_per_unit(rows_per_shard: int, most_rows: int) -> int:
    """The largest number of documents, each of up to ``most_rows`` rows, within ``rows_per_shard`` rows; at least 1."""
    return max(1, rows_per_shard // most_rows)


def count_units(documents: int, per_unit: int) -> int:
    """The number of units for ``documents`` documents."""
    return -(-documents // per_unit)


def unit_at(unit: int, documents: int, per_unit: int) -> Unit:
    """Unit number ``unit`` of a corpus of ``documents`` documents."""
    return Unit(unit, unit * per_unit, min((unit + 1) * per_unit, documents))
