"""Bodies at random, over real HTTP: no failure but refusals, and nobody else's answer changes.

``DMM_FUZZ_REQUESTS`` (250) says how many, ``DMM_FUZZ_SEED`` (0) which.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from serving.under_fire import Known, Question, steadily

from dmm_ray.client import Client
from dmm_ray.operations import OPERATIONS, OperationName
from dmm_ray.prior import ActivationPrior
from dmm_ray.protocol import LENGTH_HEADER
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.http.oip import read_inference

REQUESTS = int(os.environ.get("DMM_FUZZ_REQUESTS", "250"))
SEED = int(os.environ.get("DMM_FUZZ_SEED", "0"))
pytestmark = pytest.mark.timeout(300 + REQUESTS // 2)
D = 32
GOOD = {"steps": 2, "probes": 1}
"""Of the steady client; bodies at random often say the same, and are then computed together with its rows."""
ARGUMENTS: dict[OperationName, dict[str, Any]] = {
    "log_prob": GOOD,
    "velocity_error": {"pairs": 2},
    "denoise": {"steps": 2, "method": "heun"},
    "sample": {"steps": 2},
    "encode": {"top": 3},
}
ITEM = {"FP32": np.float32, "FP16": np.float16, "BF16": np.uint16, "INT64": np.int64, "FP64": np.float64}
ODD = st.sampled_from([-1, 0, 1, 3, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, None, "1", [1], True])


def examples(most: int) -> Any:
    """Seeded hypothesis without its own database and clock."""
    how = settings(
        max_examples=max(1, most),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(how(test))


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def good(url: str, folder: Path) -> Iterator[Good]:
    """A steady client beside the test, and the one that asks after each bad request."""
    known = Known(
        Question("log_prob", d=D, arguments=GOOD), ActivationPrior.from_pretrained(str(folder / "default"))
    )
    with Client(url) as client, steadily(lambda: known.check(client)) as steady:
        yield Good(known, client)
    assert steady.results


class Good:
    """The next good request."""

    def __init__(self, known: Known, client: Client) -> None:
        self._known = known
        self._client = client
        self.refused = 0

    def after(self, status: int, body: bytes, what: object) -> None:
        """An answer of the endpoint is allowed, and the next good one is right."""
        assert status < 500 or status == 503, f"{status} {body!r} to {what}"
        if status >= 400:
            self.refused += 1
            message = json.loads(body)["error"]
            assert message, what
            assert "\n" not in message, what
            self._known.check(self._client)


def test_bodies_from_the_schema(url: str, good: Good) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/log_prob", "/v1/generate", "/v2/models/{model}/infer"} <= {one.path for one in operations}
    for operation in operations:
        if operation.method == "post":
            for mode in GenerationMode:
                _ask_at_random(operation, mode, REQUESTS // 28, good)
        else:  # no body to spoil
            _ask_at_random(operation, GenerationMode.POSITIVE, REQUESTS // 100, good)
    assert good.refused > 10


def _ask_at_random(operation: Any, mode: GenerationMode, most: int, good: Good) -> None:
    model = st.sampled_from([*OPERATIONS, "pair.encode"])
    cases = operation.as_strategy(mode)
    if operation.path.endswith("/infer"):  # a name at random is no model: mostly 404
        version = {"version": "1"} if "{version}" in operation.path else {}
        cases = model.flatmap(
            lambda name: operation.as_strategy(mode, path_parameters={"model": name, **version})
        )

    @examples(most)
    @given(case=cases)
    def ask(case: Any) -> None:
        answer = case.call(timeout=60)
        good.after(answer.status_code, answer.content, case.as_curl_command())

    ask()


@st.composite
def tensors(
    draw: st.DrawFn, name: str, shape: tuple[int, ...], datatype: str
) -> tuple[dict[str, Any], bytes]:
    """An input as the protocol describes it, and its bytes, random bits among them."""
    count = int(np.prod(shape))
    if draw(st.booleans()):
        raw = draw(
            st.binary(min_size=count * ITEM[datatype]().nbytes, max_size=count * ITEM[datatype]().nbytes)
        )
    else:
        raw = np.arange(1, count + 1).astype(ITEM[datatype]).tobytes()
    size = {"binary_data_size": len(raw)}
    return {"name": name, "shape": list(shape), "datatype": datatype, "parameters": size}, raw


@st.composite
def messages(draw: st.DrawFn, operation: OperationName) -> tuple[dict[str, Any], bytes]:
    """A right message but for the values of its rows."""
    n = draw(st.integers(1, 5))
    main = ("n", (1,), "INT64")
    if operation != "sample":
        main = ("activations", (n, D), draw(st.sampled_from(["FP32", "FP16", "BF16"])))
    given_inputs = [draw(tensors(*main))]
    if draw(st.booleans()):
        given_inputs.append(draw(tensors("ids", draw(st.sampled_from([(n,), (n, 2)])), "INT64")))
    if operation == "denoise" and draw(st.booleans()):
        given_inputs.append(draw(tensors("u", (n,), "FP64")))
    parameters = draw(st.sampled_from([ARGUMENTS[operation], {}]))
    head = {
        "inputs": [described for described, _ in given_inputs],
        "parameters": {**parameters, "binary_data_output": draw(st.booleans())},
    }
    return head, b"".join(raw for _, raw in given_inputs)


def _mutated(draw: st.DrawFn, head: dict[str, Any]) -> None:
    """Spoil one field of the JSON."""
    one = draw(st.sampled_from(head["inputs"]))
    field = draw(
        st.sampled_from(["shape", "dimension", "datatype", "size", "name", "twice", "data", "parameter"])
    )
    if field == "shape":
        one["shape"] = draw(st.lists(ODD, max_size=4) | ODD)
    elif field == "dimension":
        one["shape"][draw(st.integers(0, len(one["shape"]) - 1))] = draw(ODD)
    elif field == "datatype":
        one["datatype"] = draw(st.sampled_from([*ITEM, "BOOL", "BYTES", "", None, 3]))
    elif field == "size":
        one["parameters"]["binary_data_size"] = draw(ODD)
    elif field == "name":
        one["name"] = draw(
            st.sampled_from(["n", "ids", "activations", "x", "../x", None]) | st.text(max_size=80)
        )
    elif field == "twice":
        head["inputs"].append(dict(one))
    elif field == "data":
        one["data"] = draw(st.lists(ODD, max_size=3))
    else:
        name = draw(
            st.sampled_from(
                [
                    "layer",
                    "seed",
                    "steps",
                    "probes",
                    "u",
                    "mode",
                    "block",
                    "top",
                    "method",
                    "precision",
                    "id",
                    "x",
                ]
            )
        )
        head["parameters"][name] = draw(ODD)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str]]:
    """An operation, a body and headers: right, or spoilt in one place."""
    operation = draw(st.sampled_from(list(OPERATIONS)))
    head, tail = draw(messages(operation))
    how = draw(
        st.sampled_from(["right", "field", "field", "short", "long", "length", "bits", "noise", "packed"])
    )
    if how == "field":
        _mutated(draw, head)
    text = json.dumps(head).encode()
    body, headers = text + tail, {LENGTH_HEADER: str(len(text))}
    if how == "short":
        body = body[: draw(st.integers(0, len(body) - 1))]
    elif how == "long":
        body += draw(st.binary(min_size=1, max_size=9))
    elif how == "length":
        lengths = ["-1", "0", "1", str(len(text) - 1), str(len(body) + 1), "9" * 30, "1e3", "0x10", "+5", "x"]
        headers = {LENGTH_HEADER: draw(st.sampled_from(lengths))} if draw(st.booleans()) else {}
    elif how == "bits":
        at = draw(st.integers(0, len(text) - 1))
        body = body[:at] + bytes([body[at] ^ (1 << draw(st.integers(0, 7)))]) + body[at + 1 :]
    elif how == "noise":
        body = draw(st.binary(max_size=200))
    elif how == "packed":
        packed = zlib.compress(body)
        body = packed if draw(st.booleans()) else packed[: draw(st.integers(0, len(packed)))] + b"x"
        headers["Content-Encoding"] = draw(st.sampled_from(["deflate", "gzip", "br", "deflate, gzip"]))
    return operation, body, headers


def test_binary_bodies(http: httpx.Client, good: Good) -> None:
    answered: set[str] = set()

    @examples(REQUESTS * 2 // 5)
    @given(request=requests())
    def ask(request: tuple[str, bytes, dict[str, str]]) -> None:
        operation, body, headers = request
        answer = http.post(f"/v2/models/{operation}/infer", content=body, headers=headers)
        good.after(answer.status_code, answer.content, request)
        if answer.status_code == 200:
            answered.add(operation)

    ask()
    assert answered == set(OPERATIONS)
    assert good.refused > REQUESTS // 10


@examples(REQUESTS)
@given(request=requests())
def test_the_codec_refuses_or_reads(request: tuple[str, bytes, dict[str, str]]) -> None:
    operation, body, headers = request
    with contextlib.suppress(RequestError):  # anything else is a bug
        assert read_inference(operation, bytearray(body), headers.get(LENGTH_HEADER)).n >= 1  # type: ignore[arg-type]
