"""The application over real HTTP: one Serve instance for the module, other applications beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from dmm_ray.client import Client
from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, Solver
from dmm_ray.serving.config import AppConfig, Limits, ServeConfig
from dmm_ray.serving.serve import running

D = 16
LIMITS = Limits(max_body_bytes=300_000, max_rows=400, max_steps=5000, max_work=1 << 30)


@pytest.fixture(scope="module")
def url(ray_local: None, single: str, several: str) -> Iterator[str]:
    config = ServeConfig(
        precision="float32",
        prior=(f"pair={several}", single),
        port=0,
        cpus=0.5,
        max_batch_rows=64,
        limits=LIMITS,
        batch_wait_ms=5,
    )
    with running(config) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as c:
        yield c


@pytest.fixture(scope="module")
def prior(single: str) -> ActivationPrior:
    return ActivationPrior.from_pretrained(single)


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-4, atol=1e-4)


def slow_body(steps: int) -> dict[str, Any]:
    """A request that takes the solver some milliseconds a step."""
    return {"activations": rows(1).tolist(), "steps": steps, "probes": 1}


def still_good(client: httpx.Client, prior: ActivationPrior) -> None:
    x = rows(2, seed=9)
    found = client.post("/v1/log_prob", json={"activations": x.tolist(), "steps": 4})
    assert found.status_code == 200, found.text
    close(found.json()["nats"], prior.log_prob(x, steps=4).nats)


def test_log_prob_is_the_prior_s(client: httpx.Client, prior: ActivationPrior) -> None:
    x, ids = rows(5), [[3, 1], [3, 2], [4, 1], [9, 9], [0, 1]]
    body = {"activations": x.tolist(), "ids": ids, "seed": 7, "steps": 6, "probes": 2, "layer": 2}
    found = client.post("/v1/log_prob", json=body).json()
    expected = prior.log_prob(x, ids=np.array(ids), seed=7, steps=6, probes=2)
    assert expected.stderr is not None
    for name in ("nats", "nats_per_dim", "stderr"):
        close(found[name], getattr(expected, name))
    assert found["evaluations"] == 12
    assert found["percentile"] is None
    assert found["latent_percentile"] is None
    assert client.post("/v1/log_prob", json={**body, "probes": 1}).json()["stderr"] is None
    exact = client.post("/v1/log_prob", json={**body, "probes": 0}).json()
    close(exact["nats"], prior.log_prob(x, steps=6, probes=0).nats)


def test_the_other_operations_are_the_prior_s(client: httpx.Client, prior: ActivationPrior) -> None:
    x = rows(3)
    given = {"activations": x.tolist(), "seed": 1}
    denoised = client.post("/v1/denoise", json={**given, "u": 0.3, "steps": 4}).json()
    close(denoised["activations"], prior.denoise(x, u=0.3, steps=4, seed=1))
    mean = client.post("/v1/denoise", json={**given, "mode": "mean"}).json()
    close(mean["activations"], prior.denoise(x, mode="mean", seed=1))
    sampled = client.post("/v1/sample", json={"n": 3, "steps": 4, "ids": [5, 6, 7]}).json()
    close(sampled["activations"], prior.sample(3, steps=4, ids=np.array([5, 6, 7])))
    encoded = client.post("/v1/encode", json={**given, "block": 1}).json()
    close(encoded["features"], prior.encode(x, block=1, seed=1))


def test_all_that_the_prior_takes_can_be_asked_for(client: httpx.Client, prior: ActivationPrior) -> None:
    x = rows(3)

    def ask(operation: str, **told: Any) -> dict[str, Any]:
        found = client.post(f"/v1/{operation}", json={"activations": x.tolist(), **told})
        assert found.status_code == 200, found.text
        return found.json()

    rk4 = ask("log_prob", steps=2, method="rk4", grid="uniform", precision="float32")
    expected = prior.log_prob(x, steps=2, solver=Solver("rk4", "uniform"))
    close(rk4["nats"], expected.nats)
    close(rk4["base"], expected.base)
    assert rk4["evaluations"] == 8
    levels = [0.1, 0.9, 0.1]
    close(ask("denoise", u=levels, steps=2)["activations"], prior.denoise(x, torch.tensor(levels), steps=2))
    close(ask("denoise", distance=0.4, steps=2)["activations"], prior.denoise(x, distance=0.4, steps=2))
    error = ask("velocity_error", pairs=3)
    close(error["velocity_error"], prior.velocity_error(x, pairs=3))
    assert error["proxy_percentile"] is None
    top = ask("encode", top=4, noises=2)
    assert set(top) == {"indices", "values"}
    close(top["values"], prior.encode(x, noises=2, top=4).values)
    assert top["indices"] == prior.encode(x, noises=2, top=4).indices.tolist()
    assert client.post("/v1/encode", json={"activations": x.tolist(), "top": 1000}).status_code == 422


def test_head_is_get_without_the_body_and_a_405_says_what_is_allowed(client: httpx.Client) -> None:
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/v1/models"):
        found = client.head(path)
        assert (found.status_code, found.content) == (200, b""), path
    for path, allowed in (("/v1/log_prob", "POST"), ("/v2/health/live", "GET")):
        found = client.delete(path)
        assert (found.status_code, found.headers["allow"]) == (405, allowed)


def test_priors_are_chosen_by_name(client: httpx.Client, several: str) -> None:
    x = rows(2)
    body = {"activations": x.tolist(), "model": "pair", "layer": 3, "steps": 4}
    expected = ActivationPrior.from_pretrained(several).log_prob(x, layer=3, steps=4)
    close(client.post("/v1/log_prob", json=body).json()["nats"], expected.nats)
    without = client.post("/v1/log_prob", json={**body, "layer": None})
    assert (without.status_code, without.json()) == (
        422,
        {"error": "layer: required; this prior models layers 1, 3"},
    )


def test_large_requests_are_split_without_a_trace(client: httpx.Client, prior: ActivationPrior) -> None:
    x, ids = rows(300), torch.arange(1000, 1300).numpy()
    body = {"activations": x.tolist(), "ids": ids.tolist(), "steps": 4}
    found = client.post("/v1/log_prob", json=body).json()
    close(found["nats"], prior.log_prob(x, ids=ids, steps=4).nats)
    sampled = client.post("/v1/sample", json={"n": 150, "steps": 2}).json()
    close(sampled["activations"], prior.sample(150, steps=2))


def test_concurrent_requests_do_not_touch_each_other(client: httpx.Client, prior: ActivationPrior) -> None:
    asked: list[tuple[str, str, Any]] = []  # operation, body, expected column or status
    for i in range(4):
        x, seed = rows(1 + 20 * i, seed=i), i % 2
        given = {"activations": x.tolist(), "seed": seed}
        bad = [{**given, "layer": 5}, {**given, "activations": [[1.0]]}, {**given, "u": 1}, given]
        asked += [
            ("log_prob", json.dumps({**given, "steps": 3}), prior.log_prob(x, steps=3, seed=seed).nats),
            ("log_prob", json.dumps({**given, "steps": 4}), prior.log_prob(x, steps=4, seed=seed).nats),
            ("denoise", json.dumps({**given, "steps": 3}), prior.denoise(x, steps=3, seed=seed)),
            ("log_prob", json.dumps(bad[i]) + "}" * (i == 3), 400 if i == 3 else 422),
        ]

    def ask(operation: str, content: str, expected: Any) -> None:
        found = client.post(f"/v1/{operation}", content=content)
        if isinstance(expected, int):
            assert found.status_code == expected
        else:
            close(found.json()["nats" if operation == "log_prob" else "activations"], expected)

    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(3):
            list(pool.map(ask, *zip(*asked, strict=True)))


@pytest.mark.parametrize(
    ("operation", "body", "status", "names"),
    [
        ("log_prob", "{", 400, "body"),
        ("log_prob", '{"activations": [[NaN]]}', 422, "activations.0.0"),
        ("log_prob", '{"activations": []}', 422, "activations"),
        ("log_prob", '{"activations": [["0"]]}', 422, "activations.0.0"),
        ("log_prob", '{"activations": [[1, 2]]}', 422, "d = 16"),
        ("log_prob", {"activations": [[0.0] * D], "unknown": 1}, 422, "unknown"),
        ("log_prob", {"activations": [[0.0] * D], "layer": 1}, 422, "layer"),
        ("log_prob", {"activations": [[0.0] * D], "model": "../etc"}, 404, "model"),
        ("log_prob", {"activations": [[0.0] * D] * 401}, 413, "rows"),
        ("log_prob", {"activations": [[0.0] * D], "steps": 5001}, 413, "steps"),
        ("log_prob", {"activations": [[1e38] * D], "steps": 2}, 422, "row 0"),
        ("denoise", {"activations": [[0.0] * D], "u": 2}, 422, "u"),
        ("sample", {"n": 401}, 413, "rows"),
        ("encode", {"activations": [[0.0] * D], "block": 2}, 422, "block"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_bad_requests(
    client: httpx.Client, prior: ActivationPrior, operation: str, body: Any, status: int, names: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    found = client.post(f"/v1/{operation}", content=content)
    assert found.status_code == status
    assert list(found.json()) == ["error"]
    assert names in found.json()["error"]
    still_good(client, prior)


def test_a_body_above_the_limit_is_refused_announced_or_not(
    client: httpx.Client, prior: ActivationPrior
) -> None:
    body = b'{"activations": [[' + b"0.125, " * 50_000 + b"1]]}"
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    for content in (body, pieces):
        found = client.post("/v1/log_prob", content=content)
        assert found.status_code == 413
        assert found.json()["error"].startswith("body: ")
    still_good(client, prior)


def test_health_answers_while_the_solver_works(client: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.post, "/v1/log_prob", json=slow_body(500))
        for _ in range(3):
            assert client.get("/v2/health/live").json() == {"live": True}
            assert client.get("/v2/health/ready").json() == {"ready": True}
        assert not busy.done()
        assert busy.result().status_code == 200


def test_the_documentation_has_examples(client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    for operation in ("log_prob", "denoise", "sample", "encode"):
        described = paths[f"/v1/{operation}"]["post"]
        assert described["requestBody"]["content"]["application/json"]["schema"]["examples"]
        assert {"200", "400", "404", "413", "422", "503"} <= set(described["responses"])
    assert {"/v2/health/live", "/v2/health/ready"} <= set(paths)


def test_a_full_queue_refuses_and_recovers(
    client: httpx.Client, url: str, single: str, prior: ActivationPrior
) -> None:
    from ray import serve

    from dmm_ray.serving.app import build

    config = AppConfig(
        precision="float32",
        prior=single,
        cpus=0.5,
        max_ongoing_requests=1,
        max_queued_requests=1,
        retry_after_s=1,
        limits=LIMITS,
        auth="none",
    )
    serve.run(build(config), name="tight", route_prefix="/tight")
    try:
        assert client.post("/tight/v1/sample", json={"n": 1}).status_code == 200
        with ThreadPoolExecutor(8) as pool:
            asked: list[Future[httpx.Response]] = [
                pool.submit(client.post, "/tight/v1/log_prob", json=slow_body(200)) for _ in range(8)
            ]
            answers = [future.result() for future in asked]
        refused = [a for a in answers if a.status_code != 200]
        assert 0 < len(refused) < 8
        for answer in refused:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert list(answer.json()) == ["error"]
        x = rows(2)
        expected = prior.log_prob(x, steps=100).nats
        with Client(f"{url}/tight") as patient, ThreadPoolExecutor(6) as pool:
            for found in [pool.submit(patient.log_prob, x.numpy(), steps=100) for _ in range(6)]:
                close(found.result().nats, expected)
    finally:
        serve.delete("tight")


def test_a_second_endpoint_on_the_cluster_is_refused(url: str, single: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="serve deploy"), running(ServeConfig(prior=single, port=0)):
        pass
    assert time.monotonic() - start < 10
    assert httpx.get(f"{url}/v2/health/ready").status_code == 200
