from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dmm_ray.operations import OperationName
from dmm_ray.protocol import from_bytes, raw_bytes
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.http.oip import InferBody, metadata, read_inference, write_answer
from dmm_ray.serving.http.oip_routes import EXAMPLE
from dmm_ray.serving.schemas import LogProbParameters, SampleParameters, request_schema

X = np.array([[1.5, -2.0, 0.25], [0.0, 3.0, 1.0]], dtype=np.float32)


def tensor(name: str, array: np.ndarray, datatype: str, binary: bool, **changed: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype}
    if binary:
        described["parameters"] = {"binary_data_size": array.nbytes}
    else:
        described["data"] = array.reshape(-1).tolist()
    return {**described, **changed}


def message(inputs: list[dict[str, Any]], *tails: bytes, **fields: Any) -> tuple[bytearray, str]:
    header = json.dumps({"inputs": inputs, **fields}).encode()
    return bytearray(header + b"".join(tails)), str(len(header))


def refusal(body: bytearray, length: str | None, operation: OperationName = "log_prob") -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        read_inference(operation, body, length)
    assert "\n" not in caught.value.message
    return caught.value.status, caught.value.message


def bf16(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def test_json_rows_flat_and_nested() -> None:
    for data in (X.reshape(-1).tolist(), X.tolist()):
        given = tensor("activations", X, "FP32", False, data=data)
        body, _ = message([given], id="a-1", parameters={"steps": 4, "layer": 2})
        found = read_inference("log_prob", body, None)
        assert found.activations is not None
        assert found.activations.dtype == np.float32
        np.testing.assert_array_equal(found.activations, X)
        assert (found.n, found.id, found.ids, found.binary) == (2, "a-1", None, False)
        assert found.arguments == LogProbParameters(steps=4, layer=2)


@pytest.mark.parametrize(
    ("array", "datatype"), [(X, "FP32"), (X.astype(np.float16), "FP16"), (bf16(X), "BF16")]
)
def test_binary_rows_of_each_datatype_and_ids_behind_them(array: np.ndarray, datatype: str) -> None:
    ids = np.array([[2**62, 1], [-5, 2]], dtype=np.int64)
    inputs = [tensor("activations", array, datatype, True), tensor("ids", ids, "INT64", True)]
    body, length = message(inputs, array.tobytes(), ids.tobytes(), parameters={"binary_data_output": True})
    found = read_inference("log_prob", body, length)
    np.testing.assert_array_equal(found.activations, X)  # these numbers are exact in 16 bits
    np.testing.assert_array_equal(found.ids, ids)
    assert found.binary


def test_fp32_is_read_where_it_lies() -> None:
    body, length = message([tensor("activations", X, "FP32", True)], X.tobytes())
    found = read_inference("encode", body, length)
    assert found.activations is not None
    assert np.shares_memory(found.activations, np.frombuffer(body, np.uint8))


def test_ids_in_json_keep_64_bits() -> None:
    ids = np.array([2**62 + 1, -(2**62) - 1], dtype=np.int64)
    body, _ = message([tensor("activations", X, "FP32", False), tensor("ids", ids, "INT64", False)])
    np.testing.assert_array_equal(read_inference("log_prob", body, None).ids, ids)


def test_samples_are_counted_by_n() -> None:
    body, _ = message([tensor("n", np.array([7]), "INT64", False)], parameters={"steps": 3})
    found = read_inference("sample", body, None)
    assert (found.n, found.activations, found.arguments) == (7, None, SampleParameters(steps=3))


GOOD = tensor("activations", X, "FP32", False)
RAW = tensor("activations", X, "FP32", True)
PART = {"parameters": {"binary_data_size": 8}}


@pytest.mark.parametrize(
    ("body", "length", "status", "names"),
    [
        (*message([RAW], X.tobytes()[:-4]), 400, "inputs.activations"),
        (*message([RAW], X.tobytes() + b"1234"), 400, "28 bytes after the JSON"),
        (*message([{**RAW, "shape": [2**30, 2**30]}], X.tobytes()), 400, "inputs.activations"),
        (*message([{**RAW, **PART}], X.tobytes()[:8]), 400, "inputs.activations: 8 bytes"),
        (message([RAW], X.tobytes())[0], "9999", 400, "Inference-Header-Content-Length"),
        (message([RAW], X.tobytes())[0], "-1", 400, "Inference-Header-Content-Length"),
        (message([RAW], X.tobytes())[0], "²", 400, "Inference-Header-Content-Length"),
        (message([RAW], X.tobytes())[0], "7", 400, "body"),
        (message([RAW], X.tobytes())[0], None, 400, "body"),
        (message([{**RAW, "shape": [2, -3]}], X.tobytes())[0], None, 400, "body"),
        (*message([{**RAW, "shape": [2, -3]}], X.tobytes()), 422, "inputs.0.shape.1"),
        (*message([{**RAW, "shape": [6]}], X.tobytes()), 422, "inputs.activations.shape"),
        (*message([{**RAW, "shape": [1, 2, 3]}], X.tobytes()), 422, "inputs.0.shape"),
        (
            *message([{**RAW, "shape": [0, 3], "parameters": {"binary_data_size": 0}}]),
            422,
            "at least one row",
        ),
        (*message([{**RAW, "datatype": "FP64"}], X.tobytes()), 422, "datatype"),
        (*message([{**RAW, "datatype": "INT64"}], X.tobytes()), 422, "datatype"),
        (*message([{**GOOD, "datatype": "BF16"}]), 422, "datatype: must be FP32 in JSON"),
        (*message([{**GOOD, **PART}]), 422, "either data or"),
        (*message([{**GOOD, "data": None}]), 422, "either data or"),
        (*message([{**GOOD, "data": [1.0, 2.0]}]), 422, "inputs.activations.data"),
        (*message([{**GOOD, "data": [[1.0], [2.0, 3.0]]}]), 422, "inputs.activations.data"),
        (*message([{**GOOD, "data": ["1"] * 6}]), 422, "inputs.activations.data.0"),
        (*message([{**GOOD, "data": [True] * 6}]), 422, "inputs.activations.data.0"),
        (*message([{**GOOD, "data": [[[1.0]]]}]), 422, "inputs.activations.data.0.0"),
        (*message([GOOD, GOOD]), 422, "names must be unique"),
        (*message([{**GOOD, "name": "x"}]), 422, "inputs.x"),
        (*message([tensor("ids", np.array([1]), "INT64", False)]), 422, "activations is missing"),
        (*message([]), 422, "inputs"),
        (*message([GOOD], parameters={"u": 0.5}), 422, "parameters.u: unknown field"),
        (*message([GOOD], parameters={"steps": "4"}), 422, "parameters.steps"),
        (*message([GOOD], parameters={"binary_data_output": 1}), 422, "binary_data_output"),
        (*message([GOOD], extra=1), 422, "extra"),
        (*message([{**GOOD, "extra": 1}]), 422, "inputs.0.extra"),
        (
            *message([GOOD], outputs=[{"name": "nats", "parameters": {"class": 1}}]),
            422,
            "outputs.0.parameters",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(body: bytearray, length: str | None, status: int, names: str) -> None:
    found, said = refusal(body, length if length and body.startswith(b'{"inputs"') else None)
    assert found == status, said
    assert names in said


@pytest.mark.parametrize("n", [[0], [-1], [1, 2]])
def test_a_wrong_count_of_samples_is_refused(n: list[int]) -> None:
    body, _ = message([tensor("n", np.array(n), "INT64", False)])
    assert refusal(body, None, "sample")[0] == 422


COLUMNS = {"nats": np.array([1.0, 2.0], np.float32), "stderr": None, "evaluations": 12}


def answer(**fields: Any) -> tuple[dict[str, Any], bytes]:
    body, _ = message([GOOD], **fields)
    found, length = write_answer("log_prob", read_inference("log_prob", body, None), dict(COLUMNS))
    return json.loads(found[:length]), found[length:] if length else b""


def test_an_answer_in_json_leaves_out_what_is_not_there() -> None:
    header, rest = answer(id="7")
    assert rest == b""
    assert (header["id"], header["model_name"]) == ("7", "log_prob")
    assert header["outputs"] == [
        {"name": "nats", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]},
        {"name": "evaluations", "datatype": "INT64", "shape": [1], "data": [12]},
    ]


def test_an_answer_in_binary_as_a_whole_or_output_by_output() -> None:
    header, rest = answer(parameters={"binary_data_output": True})
    assert [o["parameters"]["binary_data_size"] for o in header["outputs"]] == [8, 8]
    np.testing.assert_array_equal(np.frombuffer(rest[:8], "<f4"), COLUMNS["nats"])
    np.testing.assert_array_equal(np.frombuffer(rest[8:], "<i8"), [12])
    wanted = [{"name": "evaluations"}, {"name": "nats", "parameters": {"binary_data": True}}]
    header, rest = answer(outputs=wanted)
    assert [o["name"] for o in header["outputs"]] == ["evaluations", "nats"]
    assert header["outputs"][0]["data"] == [12]
    assert len(rest) == 8


@pytest.mark.parametrize("name", ["stderr", "../nats"])
def test_an_output_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="outputs"):
        answer(outputs=[{"name": name}])


def test_tensors_come_back_as_they_went() -> None:
    for array, datatype in ((X, "FP32"), (np.array([[2**63 - 1]]), "INT64"), (X.T, "FP32")):
        np.testing.assert_array_equal(from_bytes(raw_bytes(array), datatype, array.shape), array)


def test_metadata_names_the_tensors() -> None:
    assert metadata("a.sample", "sample", 5)["inputs"] == [{"name": "n", "datatype": "INT64", "shape": [1]}]
    assert metadata("denoise", "denoise", 5)["outputs"] == [
        {"name": "activations", "datatype": "FP32", "shape": [-1, 5]}
    ]


def test_the_schema_is_whole_and_its_example_is_valid() -> None:
    schema = json.dumps(request_schema(InferBody))
    assert "$ref" not in schema
    assert "$defs" not in schema
    read_inference("log_prob", bytearray(json.dumps(EXAMPLE).encode()), None)
