"""Counting what an extraction did: the figures of ``summary.json`` and the progress lines."""

from __future__ import annotations

import logging
import time
from typing import Any

from dmm_ray.activations.manifest import Manifest, Record

logger = logging.getLogger(__name__)
LOG_SECONDS = 10.0


class Figures:
    """Sums over the records of a store."""

    def __init__(self, manifest: Manifest) -> None:
        self.units = manifest.units
        self.rows = self.documents = self.tokens = self.cut = self.padding = self.bytes = 0
        self.failed: list[tuple[int, str]] = []
        self.nonfinite = dict.fromkeys(map(str, manifest.layers), 0)

    def add(self, record: Record) -> None:
        """Count a unit."""
        for name in ("rows", "documents", "tokens", "cut", "padding"):
            setattr(self, name, getattr(self, name) + getattr(record, name))
        self.bytes += sum(entry.bytes for entry in record.files.values())
        self.failed += record.failed
        for layer, count in record.nonfinite.items():
            self.nonfinite[layer] += count

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` has them."""
        return {
            "rows": self.rows,
            "documents": self.documents,
            "cut_documents": self.cut,
            "failed_documents": len(self.failed),
            "failed": [{"doc": doc, "error": error} for doc, error in self.failed[:100]],
            "tokens": self.tokens,
            "padding_share": round(self.padding / max(self.tokens + self.padding, 1), 4),
            "nonfinite_rows": self.nonfinite,
            "units": self.units,
            "bytes": self.bytes,
        }

    def line(self) -> str:
        """One line for the log."""
        bad = sum(self.nonfinite.values())
        return (
            f"{self.rows:,} rows of {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB"
            + (f"; {len(self.failed)} documents failed" if self.failed else "")
            + (f"; WARNING: {bad} rows hold values that are not finite" if bad else "")
        )


class Progress:
    """Logs units done, rows per second and the time left, every 10 seconds at most.

    The pace is counted from the first unit on, so that starting the actors is no part of it.
    """

    def __init__(self, units: int) -> None:
        self.units, self.done, self.rows = units, 0, 0
        self.started = self.first = self.logged = time.monotonic()

    def add(self, rows: int) -> None:
        """Count a finished unit."""
        self.done, self.rows, now = self.done + 1, self.rows + rows, time.monotonic()
        if self.done == 1:
            self.first = now
        elif now - self.logged >= LOG_SECONDS:
            self.logged = now
            left = int((now - self.first) / (self.done - 1) * (self.units - self.done))
            logger.info(
                "unit %d/%d  %s rows  %.0f rows/s  ETA %d:%02d",
                self.done, self.units, f"{self.rows:,}", self.rows_per_s, left // 60, left % 60,
            )  # fmt: skip

    @property
    def rows_per_s(self) -> float:
        """Rows per second since the start."""
        return self.rows / max(time.monotonic() - self.started, 1e-9)
