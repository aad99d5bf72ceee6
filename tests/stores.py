"""Stores for tests that are not about how stores are made: extracted in this process, without waiting for Ray."""

from __future__ import annotations

from typing import Any

import pytest

from dmm_ray.activations import extract as module
from dmm_ray.activations.config import ExtractConfig
from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.engine import Engine, Loading, Task
from dmm_ray.activations.lock import WriterLock
from dmm_ray.activations.plan import Plan
from dmm_ray.activations.resume import Done
from dmm_ray.activations.units import unit_at


def extract_here(**options: Any) -> str:
    """``dmm extract`` with its units run one after the other in this process; the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_units", _run_units)
        return module.extract(ExtractConfig(**options))


def _run_units(
    config: ExtractConfig, out: str, plan: Plan, corpus: Corpus, done: Done, lock: WriterLock
) -> float:
    engine = Engine(Task(out, plan.manifest, config.max_failed_documents, Loading(2048, 1, "cpu")), corpus)
    for number in range(plan.manifest.units):
        engine.extract(unit_at(number, corpus.n_documents, plan.manifest.documents_per_unit))
    return 1.0
