"""One endpoint with a language model for every test of texts and of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.text_app import Files, make_files, serving


@pytest.fixture(scope="package")
def files(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("text_app"), tiny_subject)


@pytest.fixture(scope="package")
def url(ray_local: None, files: Files, single: str) -> Iterator[str]:
    """Priors default, pair and other (of another width); texts one at a time."""
    priors = (files.default, f"pair={files.pair}", f"other={single}")
    with serving(files, prior=priors, max_ongoing_texts=1) as base:
        yield base
