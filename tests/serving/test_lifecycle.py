"""Clients that go away, new weights under load, slow answers and metrics, over real HTTP."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from dmm_ray.prior import ActivationPrior
from dmm_ray.serving.config import AppConfig, Limits, ServeConfig
from dmm_ray.serving.serve import APPLICATION, running

D = 16
NAME = "lifecycle"
"""Of the prior: other tests' endpoints in the same cluster count into the same metrics."""
OURS = {"deployment": f"prior-{NAME}"}
DEADLINE_S = 60.0
LIMITS = Limits(max_steps=1 << 20, max_work=1 << 40)
X = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
SLOW = {"activations": X.tolist(), "steps": 1500, "probes": 1}
"""A request that takes the solver seconds."""


@pytest.fixture(scope="module")
def url(ray_local: None, single: str) -> Iterator[str]:
    with running(
        ServeConfig(
            prior=(f"{NAME}={single}",), port=0, precision="float32", cpus=0.5, limits=LIMITS, auth="none"
        )
    ) as base:
        yield base


def log_prob(url: str) -> np.ndarray:
    found = httpx.post(f"{url}/v1/log_prob", json={"activations": X.tolist(), "steps": 4}, timeout=60)
    assert found.status_code == 200, found.text
    return np.array(found.json()["nats"])


def exported() -> str:
    """What every process of this machine's cluster exports now, in Prometheus' format."""
    import ray

    (node,) = ray.nodes()
    return httpx.get(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30
    ).text


def figure(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry ``labels``."""
    lines = [line for line in text.splitlines() if re.match(rf"ray_{name}(_total)?\{{", line)]
    wanted = [f'{key}="{value}"' for key, value in {**labels, "application": APPLICATION}.items()]
    return sum(float(line.split()[-1]) for line in lines if all(one in line for one in wanted))


def wait_for(name: str, least: float, **labels: str) -> str:
    """The export once a figure has come, which takes Ray some seconds."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        text = exported()
        if figure(text, name, **labels) >= least:
            return text
        time.sleep(0.5)
    found = sorted(set(re.findall(r"^ray_dmm\w*\{.*", text, re.MULTILINE)))
    raise AssertionError(f"{name} {labels} did not reach {least}; there are {found}")


def wait_until_busy(url: str) -> None:
    """Ask for next to nothing until that takes long."""
    deadline = time.monotonic() + DEADLINE_S
    with contextlib.suppress(httpx.ReadTimeout):
        while time.monotonic() < deadline:
            httpx.post(
                f"{url}/v1/encode", json={"activations": X.tolist()}, timeout=httpx.Timeout(5, read=0.5)
            )


def test_rows_of_a_client_that_has_gone_are_not_computed(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, f"{url}/v1/log_prob", json=SLOW, timeout=120)
        wait_until_busy(url)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/sample", json={"n": 37}, timeout=httpx.Timeout(5, read=0.5))
        assert not busy.done()
        assert busy.result().status_code == 200
    assert httpx.post(f"{url}/v1/denoise", json={"activations": X.tolist()}).status_code == 200
    text = wait_for("dmm_solved_rows", 2, operation="denoise", **OURS)  # the same process counts all of them
    assert figure(text, "dmm_solved_rows", operation="log_prob", **OURS) == 2
    assert figure(text, "dmm_solved_rows", operation="sample", **OURS) == 0


def test_metrics_are_exported(url: str) -> None:
    for body in ({"n": 3}, {"n": 2}, {"n": 0}):
        httpx.post(f"{url}/v1/sample", json=body)
    httpx.get(f"{url}/v2/health/live")
    text = wait_for("dmm_requests", 1, route="/v1/sample", status="422")
    assert figure(text, "dmm_requests", route="/v1/sample", status="200") >= 2
    assert figure(text, "dmm_requests", route="/v2/health/live", status="200") >= 1
    assert figure(text, "dmm_request_rows", route="/v1/sample") >= 5
    assert figure(text, "dmm_request_seconds_count", route="/v1/sample") >= 3
    text = wait_for("dmm_solved_rows", 5, operation="sample")
    assert figure(text, "dmm_batch_rows_count", operation="sample") >= 1
    assert figure(text, "dmm_solver_seconds_count", operation="sample") >= 1
    assert "ray_dmm_waiting_rows{" in text


def test_new_weights_come_without_a_lost_request(url: str, single: str, other: str) -> None:
    from ray import serve

    from dmm_ray.serving.app import build

    old, new = (ActivationPrior.from_pretrained(f).log_prob(X, steps=4).nats.numpy() for f in (single, other))
    answers: list[np.ndarray] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answers.append(log_prob(url))

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        config = AppConfig(
            prior=(f"{NAME}={other}",), precision="float32", cpus=0.5, limits=LIMITS, auth="none"
        )
        serve.run(build(config), name=APPLICATION, route_prefix="/")
        after = [log_prob(url) for _ in range(3)]
        enough.set()
        for one in asking:
            one.result()
    assert len(answers) > 2
    for nats in answers:
        assert np.allclose(nats, old, rtol=1e-4) or np.allclose(nats, new, rtol=1e-4)
    np.testing.assert_allclose(after, [new] * 3, rtol=1e-4, atol=1e-4)


def test_an_answer_that_takes_too_long_is_given_up(url: str, single: str) -> None:
    from ray import serve

    from dmm_ray.serving.app import build

    config = AppConfig(prior=(single,), cpus=0.5, limits=LIMITS, auth="none", timeout_s=0.3, retry_after_s=2)
    serve.run(build(config), name="impatient", route_prefix="/impatient")
    try:
        found = httpx.post(f"{url}/impatient/v1/log_prob", json=SLOW, timeout=60)
        assert (found.status_code, found.headers["retry-after"]) == (503, "2")
        assert "no answer in 0.3 s" in found.json()["error"]
    finally:
        serve.delete("impatient")
