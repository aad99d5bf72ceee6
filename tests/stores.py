"""Jobs for tests that are not about Ray: their units are done in this process, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.extract import extract
from dmm_ray.units import job as module
from dmm_ray.units.job import Job
from dmm_ray.units.resources import Resources
from dmm_ray.units.unit import Unit


@contextmanager
def units_here(before: Callable[[], object] | None = None) -> Iterator[None]:
    """Inside, `extract`, `score` and the like start no Ray: the one actor lives in this process.

    Args:
        before: called before each unit.
    """

    def work(job: Job, units: list[Unit]) -> Generator[dict[str, Any]]:
        kind, arguments = job.actor(Resources(actors=1, fitting=1, cpus=1.0, gpus=0.0), len(units))
        actor = kind(*arguments)
        for unit in units:
            if before is not None:
                before()
            row = actor({name: np.array([value]) for name, value in unit._asdict().items()})
            yield json.loads(row["result"][0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "work", work)
        yield


def extract_here(**options: Any) -> str:
    """``dmm extract`` in this process; the store."""
    with units_here():
        return extract(ExtractConfig(**options))
