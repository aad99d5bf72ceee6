"""Ten times more requests than an endpoint can hold: it refuses the rest at once, stays small, and recovers at once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from serving.under_fire import Known, Question, resident

from dmm_ray.client import Client
from dmm_ray.prior import ActivationPrior
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.serve import running

ONGOING, QUEUED = 2, 2
HELD = ONGOING + QUEUED
CLIENTS = 10 * HELD
LOAD_S = 6.0
PAUSE_S = 0.1
"""Between two requests of a client: shorter, and the crowd itself takes the cores away from the endpoint."""
QUESTION = Question("log_prob", arguments={"steps": 60, "probes": 1})
MOST_GROWTH = 96 << 20
"""Bytes that the endpoint's processes together may grow by under overload: buffers, threads, the allocator's slack."""


@dataclass(frozen=True)
class Asked:
    """One request of the crowd."""

    status: int
    seconds: float
    retry_after: str
    right: bool


@pytest.fixture(scope="module")
def url(ray_local: None, single: str) -> Iterator[str]:
    config = ServeConfig(
        precision="float32",
        prior=(single,),
        port=0,
        auth="none",
        cpus=0.5,
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        max_batch_rows=QUESTION.n,  # one request a solver call: more work never makes it cheaper
        retry_after_s=1,
    )
    with running(config) as base:
        yield base


@pytest.fixture(scope="module")
def known(single: str) -> Known:
    return Known(QUESTION, ActivationPrior.from_pretrained(single))


def crowd(url: str, known: Known) -> list[Asked]:
    """What ``CLIENTS`` clients got that ask again far too soon, whatever they are told, for ``LOAD_S`` seconds."""
    x = np.random.default_rng([QUESTION.n, QUESTION.seed]).normal(size=(QUESTION.n, QUESTION.d))
    body = {"activations": x.astype(np.float32).tolist(), **QUESTION.arguments}
    start = threading.Barrier(CLIENTS)

    def ask_on(_: int) -> list[Asked]:
        found = []
        with httpx.Client(base_url=url, timeout=120) as http:
            start.wait()
            end = time.monotonic() + LOAD_S
            while (began := time.monotonic()) < end:
                answer = http.post("/v1/log_prob", json=body)
                seconds = time.monotonic() - began
                right = answer.status_code != 200 or known.which(np.array(answer.json()["nats"])) == {0}
                found.append(Asked(answer.status_code, seconds, answer.headers.get("retry-after", ""), right))
                time.sleep(PAUSE_S)
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [asked for found in pool.map(ask_on, range(CLIENTS)) for asked in found]


def test_ten_times_too_much(url: str, known: Known) -> None:
    with Client(url, retries=0) as client:
        alone = statistics.median(_seconds(known, client) for _ in range(7))
        crowd(url, known)  # its first connections and threads are not growth
        before = resident()
        asked = crowd(url, known)
        known.check(client)  # at once
        after = resident()
        again = statistics.median(_seconds(known, client) for _ in range(7))
    accepted = sorted(one.seconds for one in asked if one.status == 200)
    refused = sorted(one.seconds for one in asked if one.status != 200)
    assert all(one.right for one in asked)
    assert {one.status for one in asked} <= {200, 429, 503}
    assert {one.retry_after for one in asked if one.status != 200} == {"1"}
    assert len(refused) > len(accepted) > HELD
    assert after - before < MOST_GROWTH
    # A queue of HELD, each served in the time of one, on cores that the crowd and its refusals take most of.
    assert accepted[int(0.99 * len(accepted))] < 10 * HELD * alone
    assert statistics.median(refused) < statistics.median(accepted)
    assert again < 4 * alone


def _seconds(known: Known, client: Client) -> float:
    began = time.monotonic()
    known.check(client)
    return time.monotonic() - began
