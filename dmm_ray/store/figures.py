"""Totals over the records of a store, as reported in ``summary.json``."""

from __future__ import annotations

from typing import Any

from dmm_ray.store.manifest import Manifest, Record

KEPT_FAILURES = 100


class Figures:
    """Totals over the records of a store."""

    def __init__(self, manifest: Manifest) -> None:
        self.units = manifest.units
        self.rows = self.documents = self.tokens = self.long = self.padding = self.excluded = self.bytes = 0
        self.failed = 0
        self.failures: list[tuple[int, str]] = []
        """The first failed documents, with reasons."""
        self.nonfinite = dict.fromkeys(map(str, manifest.layers), 0)
        self.outliers = dict.fromkeys(map(str, manifest.layers), 0)
        self.massive: dict[int, dict[int, float]] = {}

    def add(self, record: Record) -> None:
        """Add a unit to the totals."""
        for name in ("rows", "documents", "tokens", "long", "padding", "excluded"):
            setattr(self, name, getattr(self, name) + getattr(record, name))
        self.bytes += sum(entry.bytes for entry in record.files.values())
        self.failed += len(record.failed)
        self.failures += record.failed[: KEPT_FAILURES - len(self.failures)]
        for total, counts in ((self.nonfinite, record.nonfinite), (self.outliers, record.outliers)):
            for layer, count in counts.items():
                total[layer] += count

    def summary(self) -> dict[str, Any]:
        """The totals in the form used by ``summary.json``."""
        return {
            "rows": self.rows,
            "documents": self.documents,
            "long_documents": self.long,
            "failed_documents": self.failed,
            "failed": [{"doc": doc, "error": error} for doc, error in self.failures],
            "tokens": self.tokens,
            "padding_share": round(self.padding / max(self.tokens + self.padding, 1), 4),
            "excluded_rows": self.excluded,
            "nonfinite_rows": self.nonfinite,
            "outlier_rows": self.outliers,
            "massive_dimensions": {str(layer): found for layer, found in self.massive.items()},
            "units": self.units,
            "bytes": self.bytes,
        }

    def line(self) -> str:
        """One line for the log."""
        bad = sum(self.nonfinite.values())
        return (
            f"{self.rows:,} rows of {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB"
            + (f"; {self.failed} documents failed" if self.failed else "")
            + (f"; {self.excluded:,} rows excluded" if self.excluded else "")
            + (f"; WARNING: {bad} rows contain NaN or Inf" if bad else "")
        )
