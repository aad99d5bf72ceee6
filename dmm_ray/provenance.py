"""What a result came from: versions, inputs, and the ``summary.json`` that says so beside it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from dmm_ray.files import join, write_json

SUMMARY = "summary.json"
PACKAGES = ("dmm-ray", "ray", "torch", "transformers", "pyarrow", "numpy", "pydantic")


def write_summary(folder: str, inputs: dict[str, Any], seconds: float, **results: Any) -> dict[str, Any]:
    """Write ``summary.json`` into a verb's folder; its content.

    Args:
        folder: of the verb.
        inputs: what it was given.
        seconds: that it took.
        results: more keys, as ``figures``.
    """
    summary = {**results, "inputs": inputs, "versions": versions(), "seconds": round(seconds, 3)}
    write_json(join(folder, SUMMARY), summary)
    return summary


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, for ``summary.json``."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
