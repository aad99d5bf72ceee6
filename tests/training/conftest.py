"""A store of a few thousand rows to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stores import extract_here
from texts import make_texts


@pytest.fixture(scope="session")
def train_store(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 documents of the tiny subject, layers 1 and 2, about 6,000 rows each in several shards."""
    folder = tmp_path_factory.mktemp("train")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(300, seed=2)))
    return extract_here(
        model=str(tiny_subject),
        text=str(text),
        layers=[1, 2],
        out=str(folder / "store"),
        rows_per_shard=64 * 63,
    )
