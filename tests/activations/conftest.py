"""A store extracted from the tiny subject and text; extraction options that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SMALL = {"layers": [1, 2], "dtype": "float32", "rows_per_shard": 700, "actors": 1, "cpus_per_actor": 1}


@pytest.fixture(scope="session")
def tiny_options(tiny_subject: Path, tiny_text: Path) -> dict[str, Any]:
    """Options of an extraction of ``tiny_text`` in 6 units of at most 11 documents (all but ``out``)."""
    return {"model": str(tiny_subject), "text": str(tiny_text), **SMALL}


@pytest.fixture(scope="session")
def tiny_store(
    ray_local: None, tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished float32 store of layers 1 and 2. Do not change it."""
    from dmm_ray.activations.extract import ExtractConfig, extract

    out = tmp_path_factory.mktemp("stores") / "tiny"
    return Path(extract(ExtractConfig(out=str(out), **tiny_options)))
