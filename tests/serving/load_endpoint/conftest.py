"""One endpoint with a language model and narrow limits for odd requests and for steady load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.load_endpoint.bounds import LIMITS
from serving.text_app import make_files, serving


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load_app")


@pytest.fixture(scope="package")
def url(ray_local: None, folder: Path, tiny_subject: Path) -> Iterator[str]:
    files = make_files(folder, tiny_subject)
    with serving(files, limits=LIMITS, auth="none", batch_wait_ms=1, max_batch_rows=64) as base:
        yield base
