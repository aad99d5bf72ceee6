"""The Open Inference Protocol by its usual client, tokens and browsers' rules, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from dmm_ray.prior import ActivationPrior
from dmm_ray.serving.config import Limits, ServeConfig
from dmm_ray.serving.serve import running

D = 16
TOKEN = "a-token-of-this-test"
# tritonclient writes into the headers it is given: pass copies
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PAGE = "https://lab.example"
DTYPES = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"another\n{TOKEN}\n")
    return path


@pytest.fixture(scope="module")
def url(ray_local: None, single: str, several: str, token_file: Path) -> Iterator[str]:
    config = ServeConfig(
        precision="float32",
        prior=(f"pair={several}", single),
        port=0,
        cpus=0.5,
        limits=Limits(max_rows=40_000),
        token_file=str(token_file),
        cors_origins=(PAGE,),
    )
    with running(config) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://"), concurrency=4) as c:
        yield c


@pytest.fixture(scope="module")
def prior(single: str) -> ActivationPrior:
    return ActivationPrior.from_pretrained(single)


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def given(name: str, array: np.ndarray, datatype: str = "FP32", binary: bool = True) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def expected(prior: ActivationPrior, operation: str, x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    subject: Any = len(x) if operation == "sample" else torch.from_numpy(x)
    result = getattr(prior, operation)(subject, **arguments)
    return (result.nats if operation == "log_prob" else result).numpy()


def test_version_1_is_the_only_one(client: triton.InferenceServerClient, prior: ActivationPrior) -> None:
    x, ids = given("activations", rows(2)), given("ids", np.array([3, 4], np.int32), "INT32")
    u = given("u", np.array([0.2, 0.7]), "FP64")
    ask = {"parameters": {"steps": 2}, "headers": dict(HEADERS), "priority": 1, "timeout": 60}
    found = client.infer("denoise", [x, ids, u], "1", **ask).as_numpy("activations")
    expected = prior.denoise(torch.from_numpy(rows(2)), torch.tensor([0.2, 0.7]), 2, ids=np.array([3, 4]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InferenceServerException, match="every model has version 1 only"):
        client.infer("denoise", [x], "2", headers=dict(HEADERS))


CALLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("log_prob", "nats", {"steps": 4, "probes": 2, "seed": 3, "layer": 2}),
    ("denoise", "activations", {"steps": 4, "u": 0.3, "mode": "sample", "seed": 1}),
    ("encode", "features", {"u": 0.2, "block": 1, "noises": 2}),
    ("velocity_error", "velocity_error", {"pairs": 3}),
    ("sample", "activations", {"steps": 4, "seed": 5}),
)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert "binary_tensor_data" in client.get_server_metadata(headers=dict(HEADERS))["extensions"]
    for name in ("log_prob", "default.denoise", "pair.sample", "encode"):
        assert client.is_model_ready(name, headers=dict(HEADERS))
        found = client.get_model_metadata(name, headers=dict(HEADERS))
        assert found["name"] == name
        first = found["inputs"][0]
        assert (first["name"], first["shape"]) == (
            ("n", [1]) if "sample" in name else ("activations", [-1, D])
        )
        assert client.get_model_metadata(name, "1", headers=dict(HEADERS)) == found
        assert client.is_model_ready(name, "1", headers=dict(HEADERS))
        assert not client.is_model_ready(name, "2", headers=dict(HEADERS))
    for name in ("nothing", "other.log_prob", "../log_prob", "pair."):
        assert not client.is_model_ready(name, headers=dict(HEADERS))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("operation", "output", "arguments"), CALLS)
def test_every_operation_is_the_prior_s(
    client: triton.InferenceServerClient,
    prior: ActivationPrior,
    operation: str,
    output: str,
    arguments: dict[str, Any],
    binary: bool,
) -> None:
    x = rows(3)
    main = (
        given("n", np.array([3]), "INT64", binary)
        if operation == "sample"
        else given("activations", x, binary=binary)
    )
    wanted = [triton.InferRequestedOutput(output, binary_data=binary)]
    found = client.infer(
        operation, [main], outputs=wanted, request_id="mine", parameters=arguments, headers=dict(HEADERS)
    )
    assert found.get_response()["id"] == "mine"
    np.testing.assert_allclose(
        found.as_numpy(output), expected(prior, operation, x, arguments), rtol=1e-4, atol=1e-4
    )


def test_16_bit_rows_and_names_of_rows_concurrently(url: str, prior: ActivationPrior) -> None:
    def ask(i: int) -> None:
        datatype, (operation, output, arguments) = list(DTYPES)[i % 3], CALLS[i % 2]
        short = rows(1 + i, seed=i).astype(DTYPES[datatype])
        ids = np.array([[7, j] for j in range(len(short))])
        with triton.InferenceServerClient(url.removeprefix("http://")) as client:
            found = client.infer(
                operation,
                [given("activations", short, datatype), given("ids", ids, "INT64")],
                parameters=arguments,
                headers=dict(HEADERS),
                request_compression_algorithm=(None, "gzip", "deflate")[i % 3],
            )
        exact = expected(prior, operation, short.astype(np.float32), {**arguments, "ids": ids})
        np.testing.assert_allclose(found.as_numpy(output), exact, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(12)))


def test_a_large_binary_request(client: triton.InferenceServerClient, prior: ActivationPrior) -> None:
    x = rows(20_000)  # 1.3 MB: it travels through the object store
    found = client.infer("encode", [given("activations", x)], parameters={"block": 0}, headers=dict(HEADERS))
    some = expected(prior, "encode", x[-3:], {"block": 0, "ids": np.arange(19_997, 20_000)})
    np.testing.assert_allclose(found.as_numpy("features")[-3:], some, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "inputs", "parameters", "status"),
    [
        ("nothing", [("activations", rows(1), "FP32")], {}, "404"),
        ("log_prob", [("activations", rows(1)[:, :3], "FP32")], {}, "422"),
        ("log_prob", [("activations", rows(1), "FP32")], {"layer": 9}, "422"),
        ("log_prob", [("activations", np.full((1, D), np.nan, np.float32), "FP32")], {}, "422"),
        ("log_prob", [("activations", rows(2), "FP32"), ("ids", np.array([1]), "INT64")], {}, "422"),
        ("log_prob", [("activations", rows(2), "FP32"), ("ids", np.ones((2, 3), int), "INT64")], {}, "422"),
        ("log_prob", [("activations", rows(1).astype(float), "FP64")], {}, "422"),
        ("sample", [("n", np.array([2**62]), "INT64")], {}, "413"),
        ("pair.sample", [("n", np.array([1]), "INT64")], {}, "422"),
    ],
)
def test_bad_requests(
    client: triton.InferenceServerClient,
    model: str,
    inputs: list[Any],
    parameters: dict[str, Any],
    status: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [given(*one) for one in inputs], parameters=parameters, headers=dict(HEADERS))
    assert caught.value.status() == status
    assert client.infer("sample", [given("n", np.array([1]), "INT64")], headers=dict(HEADERS)).as_numpy(
        "activations"
    ).shape == (1, D)


def test_tokens(url: str, token_file: Path) -> None:
    for path in ("/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"):
        assert httpx.get(url + path).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        found = httpx.post(f"{url}/v1/sample", json={"n": 1}, headers=headers)
        assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert list(found.json()) == ["error"]
    assert httpx.post(f"{url}/v1/sample", json={"n": 1}, headers=dict(HEADERS)).status_code == 200
    before = token_file.read_text()
    token_file.write_text("a new one\n")
    assert httpx.post(f"{url}/v1/sample", json={"n": 1}, headers=dict(HEADERS)).status_code == 401
    token_file.write_text(before)
    assert httpx.post(f"{url}/v1/sample", json={"n": 1}, headers=dict(HEADERS)).status_code == 200


def test_only_the_pages_that_are_named_may_ask(url: str) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in ((PAGE, PAGE), ("https://elsewhere.example", None)):
        found = httpx.options(f"{url}/v1/sample", headers={"Origin": origin, **asks})
        assert found.headers.get("access-control-allow-origin") == allowed
    found = httpx.post(f"{url}/v1/sample", json={"n": 1}, headers={"Origin": PAGE})
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (401, PAGE)


def test_a_request_id_comes_back_once(url: str) -> None:
    found = httpx.get(f"{url}/v2/health/live", headers={"X-Request-ID": "mine-7"})
    assert found.headers.get_list("x-request-id") == ["mine-7"]
    assert len(httpx.get(f"{url}/v2/health/live").headers["x-request-id"]) > 8


def test_the_documentation_needs_nothing_from_elsewhere(url: str) -> None:
    found = httpx.get(f"{url}/docs")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "/v2/models/{model}/infer" in found.text
    assert "src=" not in found.text
    assert "<script" not in found.text
