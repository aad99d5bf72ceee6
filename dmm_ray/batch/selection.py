"""Selects the rows of a store to process, and reads those of a unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dmm_ray.errors import UserError
from dmm_ray.parallel import in_order
from dmm_ray.prior import PriorConfig
from dmm_ray.store.match import check_finite
from dmm_ray.store.reader import ActivationStore, RowGroup, Rows
from dmm_ray.store.split import PARTS, Split, hash_documents
from dmm_ray.units.unit import Unit


class RowSource(Protocol):
    """A source of the rows of units."""

    def rows(self, unit: Unit) -> Rows:
        """The rows of documents ``unit.first`` up to but excluding ``unit.stop``, ordered by (doc, position)."""


@dataclass(frozen=True)
class Draws:
    """Rows to be sampled: row i is document i, at position 0, without a token."""

    def rows(self, unit: Unit) -> Rows:
        """The ids of the rows, with activations of width 0."""
        n = unit.stop - unit.first
        doc = np.arange(unit.first, unit.stop, dtype=np.int64)
        return Rows(torch.empty(n, 0), doc, np.zeros(n, np.int32), np.full(n, -1, np.int32))


@dataclass(frozen=True)
class Selection:
    """A selection of rows that depends only on their ids."""

    split: Split | None = None
    part: int = 0
    """TRAIN, VALIDATION or TEST, if there is a split."""
    seed: int = 0
    highest: int = 2**64 - 1
    """Select rows whose hash of (seed, doc, position) is at most this."""

    def documents(self, doc: np.ndarray) -> np.ndarray:
        """Whether each document is in the part, (n,) bool."""
        return np.ones(len(doc), bool) if self.split is None else self.split.of(doc) == self.part

    def mask(self, doc: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Whether each row is selected, (n,) bool."""
        inside = self.documents(doc)
        if self.highest < 2**64 - 1:
            inside &= hash_rows(doc, position, self.seed) <= np.uint64(self.highest)
        return inside


def hash_rows(doc: np.ndarray, position: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 for each (doc, position)."""
    return hash_documents(hash_documents(doc, seed) ^ position.astype(np.uint64), seed)


class StoreRows:
    """The selected rows of one layer of a store, by runs of documents.

    Args:
        store: the store.
        layer: the layer.
        selection: the rows to select.
    """

    def __init__(self, store: ActivationStore, layer: int, selection: Selection) -> None:
        self.store, self.layer, self.selection = store, layer, selection
        self._groups: dict[int, list[RowGroup]] = defaultdict(list)
        for group in store.row_groups(layer):
            self._groups[group.shard].append(group)

    def rows(self, unit: Unit) -> Rows:
        """The selected rows of the unit's documents. Raises UserError if one contains NaN or Inf."""
        groups = self._of(unit)
        found = self.store.gather(self.layer, groups, [self._inside(group, unit) for group in groups])
        check_finite(self.store, self.layer, found)
        return found

    def _of(self, unit: Unit) -> list[RowGroup]:
        per_shard = self.store.manifest.documents_per_unit
        shards = range(unit.first // per_shard, (unit.stop - 1) // per_shard + 1)
        return [group for shard in shards for group in self._groups.get(shard, ())]

    def _inside(self, group: RowGroup, unit: Unit) -> np.ndarray:
        names = self.store.read(self.layer, group, ("doc", "position"))
        mask = (names.doc >= unit.first) & (names.doc < unit.stop)
        return np.flatnonzero(mask & self.selection.mask(names.doc, names.position))


def select(
    store: ActivationStore, layer: int, config: PriorConfig, part: str, rows: int | None, seed: int
) -> Selection:
    """Select rows of a part of the prior's split, or of all documents: ``rows`` rows drawn by ``seed``, or all.

    Raises:
        UserError: the prior has no split, or there are no such rows.
    """
    selection = Selection(seed=seed)
    if part != "all":
        if not config.split:
            raise UserError("split: this prior was saved without one; give --split all")
        selection = Selection(Split.model_validate(config.split), PARTS.index(part), seed)
    counted = 0
    lowest = np.empty(0, np.uint64)
    for found in _hashes(store, layer, selection):
        counted += len(found)
        lowest = np.concatenate([lowest, found])
        if rows is None and counted:
            return selection  # every row of the part, and there is at least one
        if rows is not None and len(lowest) > rows:
            lowest = np.partition(lowest, rows - 1)[:rows]
    if not counted:
        raise UserError(f"split: {store.uri} has no rows of {part} documents; give another --split")
    if counted <= (rows or 0):
        return selection
    return Selection(selection.split, selection.part, seed, int(lowest.max()))


def _hashes(store: ActivationStore, layer: int, selection: Selection) -> Iterator[np.ndarray]:
    """Hashes of the rows of the part, by row group; reads only the ids."""

    def read(group: RowGroup) -> np.ndarray:
        names = store.read(layer, group, ("doc", "position"))
        inside = selection.documents(names.doc)
        return hash_rows(names.doc[inside], names.position[inside], selection.seed)

    return in_order(read, iter(store.row_groups(layer)))


def expected_rows(store: ActivationStore, selection: Selection, rows: int | None) -> int:
    """The approximate number of selected rows."""
    documents = store.manifest.documents
    sample = np.linspace(0, documents - 1, min(documents, 4096)).astype(np.int64)
    inside = round(store.rows * float(selection.documents(sample).mean()))
    return max(1, min(inside, rows or inside))


def suspects(store: ActivationStore, layer: int) -> Iterator[Unit]:
    """Runs of documents of which a row may contain NaN or Inf, according to the records."""
    for record in store.records:
        if record.nonfinite.get(str(layer)):
            yield Unit(record.unit, record.first_document, record.first_document + record.documents)
