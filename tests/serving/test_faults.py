"""Processes killed and weights replaced under load: a client that asks again loses nothing."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving.under_fire import Known, Question, processes, steadily

from dmm_ray.client import Client
from dmm_ray.prior import ActivationPrior
from dmm_ray.serving.config import AppConfig, ServeConfig
from dmm_ray.serving.serve import APPLICATION, running

pytestmark = [pytest.mark.fault, pytest.mark.slow]
THREADS = 4
QUESTIONS = (
    Question("log_prob", n=2, arguments={"steps": 40, "probes": 1}),
    Question("denoise", n=20, seed=1, arguments={"u": 0.4, "steps": 10}),
    Question("sample", n=30, seed=2, arguments={"steps": 10}),
)
TITLES = ["prior-default", "dmm:Ingress", *(["ProxyActor"] if os.environ.get("DMM_CHAOS_TRIALS") else [])]
"""Of the processes that are killed. Serve's own proxy takes long to come back: `make chaos` does that."""
COMMON: dict[str, Any] = {"auth": "none", "precision": "float32", "cpus": 0.5, "ingress_replicas": 2}


@pytest.fixture(scope="module")
def url(ray_local: None, single: str) -> Iterator[str]:
    with running(ServeConfig(prior=(single,), port=0, **COMMON)) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, chunk_rows=7, deadline=120) as found:  # parts: several of each answer are under way
        yield found


@pytest.fixture(scope="module")
def known(single: str, other: str) -> list[Known]:
    priors = [ActivationPrior.from_pretrained(folder) for folder in (single, other)]
    return [Known(question, *priors) for question in QUESTIONS]


def under_load(client: Client, known: list[Known], fault: Callable[[], object]) -> Counter[object]:
    """How many answers came by each prior, asked before, during and after ``fault``. Every one is right."""
    with steadily(lambda: [one.check(client) for one in known], THREADS) as steady:
        steady.wait_for(2 * THREADS)
        fault()
        steady.wait_for(4 * THREADS)
    return Counter(prior for found in steady.results for by in found for prior in by)  # type: ignore[attr-defined]


def kill(*titles: str) -> int:
    """SIGKILL to the first process of one of these titles; its number."""
    victim = processes(*titles)[0]
    victim.send_signal(signal.SIGKILL)
    return int(victim.pid)


def deploy(prior: str, **options: Any) -> None:
    """Another configuration of the application that runs; returns when it is up."""
    from ray import serve

    from dmm_ray.serving.app import build

    config = AppConfig(prior=(prior,), **COMMON, **options)
    serve.run(build(config), name=APPLICATION, route_prefix="/")


@pytest.mark.parametrize("title", TITLES)
def test_a_process_is_killed(client: Client, known: list[Known], title: str) -> None:
    found = under_load(client, known, lambda: kill(title))
    assert set(found) == {0}


@pytest.mark.skipif("DMM_CHAOS_TRIALS" not in os.environ, reason="`make chaos` runs it")
def test_processes_are_replaced(client: Client, known: list[Known], single: str) -> None:
    """One after the other: their arguments change with the weights."""
    before = {process.pid for process in processes("prior-default")}
    under_load(client, known, lambda: deploy(single, max_batch_rows=8))
    assert [one.check(client) for one in known] == [{0}] * len(known)
    assert not before & {process.pid for process in processes("prior-default")}
