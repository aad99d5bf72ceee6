"""``summary.json``: the results of a command and their provenance: inputs, versions, seconds."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from dmm_ray.files import join, write_json

SUMMARY = "summary.json"
PACKAGES = ("dmm-ray", "ray", "torch", "transformers", "pyarrow", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def with_provenance(results: Mapping[str, Any], inputs: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The content of ``summary.json``: the results by name, and ``inputs``, ``versions`` and ``seconds``.

    Args:
        results: the results; by convention, a few numbers go under ``figures``.
        inputs: what they were made from: the command's configuration, hashes.
        seconds: how long the command took.

    Example:
        >>> sorted(with_provenance({"figures": {"loss": 0.5}}, {"seed": 0}, 1.5))
        ['figures', 'inputs', 'seconds', 'versions']
    """
    return {**results, "inputs": dict(inputs), "versions": versions(), "seconds": round(seconds, 3)}


def write_summary(out: str, results: Mapping[str, Any], inputs: Mapping[str, Any], seconds: float) -> None:
    """Write ``summary.json`` into the folder ``out``, with the content of :func:`with_provenance`.

    Raises:
        ValueError: a number is NaN or Inf, which JSON cannot represent; use None for missing values.
    """
    write_json(join(out, SUMMARY), with_provenance(results, inputs, seconds))
