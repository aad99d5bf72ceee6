"""Small jobs of `dmm score` and the like, and the rows they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_ray.store.reader import ActivationStore, Rows

LAYER = 2
OPTIONS: dict[str, Any] = {
    "actors": 1,
    "cpus_per_actor": 1,
    "rows_per_shard": 90,
    "precision": "float32",
}
SCORE = {"steps": 2, "window_tokens": 8}


def all_rows(store: ActivationStore) -> Rows:
    """Every row of the layer, ordered by (doc, position)."""
    groups = store.row_groups(LAYER)
    return store.gather(LAYER, groups, [np.arange(group.rows) for group in groups])


def ids_of(rows: Rows) -> Tensor:
    """(n, 2)."""
    return torch.from_numpy(np.stack([rows.doc, rows.position.astype(np.int64)], axis=1))


def files(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on how the work was spread."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*/*")) if p.is_file()}
