"""One endpoint with a language model for every test of texts, of the page and of the client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.text_app import CPUS, LIMITS, TOKEN, Files, beside, make_files, serving

from dmm_ray.serving.config import AppConfig


@pytest.fixture(scope="package")
def files(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("text_app"), tiny_subject)


@pytest.fixture(scope="package")
def url(ray_local: None, files: Files, single: str) -> Iterator[str]:
    """Priors default, pair and other (of another width); texts one at a time; at most 60 rows per request."""
    priors = (files.default, f"pair={files.pair}", f"other={single}")
    limits = LIMITS.model_copy(update={"max_rows": 60})
    with serving(files, prior=priors, limits=limits, max_ongoing_texts=1, batch_wait_ms=1) as base:
        yield base


@pytest.fixture(scope="package")
def guarded(url: str, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of an application beside it that has no language model and asks for ``TOKEN``."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(TOKEN + "\n")
    config = AppConfig(
        prior=files.default, cpus=CPUS, auth="tokens", token_file=str(file), precision="float32"
    )
    with beside("guarded", config) as path:
        yield path
