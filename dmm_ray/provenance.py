"""``summary.json``: the results of a command, and where they come from: inputs, versions, seconds."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from dmm_ray.files import join, write_json

SUMMARY = "summary.json"
PACKAGES = ("dmm-ray", "ray", "torch", "transformers", "pyarrow", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
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
        results: what came out; by convention under ``figures`` where they are but a few numbers.
        inputs: what it was made from: the command's configuration, hashes.
        seconds: how long that took.

    Example:
        >>> sorted(with_provenance({"figures": {"loss": 0.5}}, {"seed": 0}, 1.5))
        ['figures', 'inputs', 'seconds', 'versions']
    """
    return {**results, "inputs": dict(inputs), "versions": versions(), "seconds": round(seconds, 3)}


def write_summary(out: str, results: Mapping[str, Any], inputs: Mapping[str, Any], seconds: float) -> None:
    """Write ``summary.json`` into the folder ``out``, as :func:`with_provenance` makes it.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; give None where there is no value.
    """
    write_json(join(out, SUMMARY), with_provenance(results, inputs, seconds))
