from __future__ import annotations

import json

import pytest

from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.http.bodies import parse
from dmm_ray.serving.schemas import BODIES, Body, DenoiseBody, LogProbBody, SampleBody, request_schema

GOOD = '{"activations": [[1, 2.5]]}'


def refusal(kind: type[Body], text: str | bytes) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        parse(kind, text if isinstance(text, bytes) else text.encode())
    return caught.value.status, caught.value.message


@pytest.mark.parametrize(
    ("text", "status", "names"),
    [
        ("", 400, "body"),
        ("{", 400, "body"),
        pytest.param(b"\xff\xfe{}", 400, "body", id="not UTF-8"),
        ("[" * 100_000, 400, "body"),
        ("null", 422, "body"),
        ("[]", 422, "body"),
        ("{}", 422, "activations"),
        ('{"activations": null}', 422, "activations"),
        ('{"activations": []}', 422, "activations"),
        ('{"activations": [1, 2]}', 422, "activations.0"),
        ('{"activations": [["1"]]}', 422, "activations.0.0"),
        ('{"activations": [[1], [true]]}', 422, "activations.1.0"),
        ('{"activations": [[null]]}', 422, "activations.0.0"),
        ('{"activations": [[NaN]]}', 422, "activations.0.0"),
        ('{"activations": [[1, -Infinity]]}', 422, "activations.0.1"),
        ('{"activations": [[1e999]]}', 422, "activations.0.0"),
        ('{"activations": [[1]], "extra": 1}', 422, "extra"),
        ('{"activations": [[1]], "u": 0.5}', 422, "u"),
        ('{"activations": [[1]], "steps": 0}', 422, "steps"),
        ('{"activations": [[1]], "steps": 2.0}', 422, "steps"),
        ('{"activations": [[1]], "steps": "8"}', 422, "steps"),
        ('{"activations": [[1]], "probes": -1}', 422, "probes"),
        ('{"activations": [[1]], "seed": 9223372036854775808}', 422, "seed"),
        ('{"activations": [[1]], "ids": [1.5]}', 422, "ids.0"),
        ('{"activations": [[1]], "ids": [[1, 2, 3]]}', 422, "ids.0"),
        ('{"activations": [[1]], "layer": true}', 422, "layer"),
        ('{"activations": [[1]], "model": 3}', 422, "model"),
    ],
)
def test_a_bad_body_is_refused_with_its_field(text: str | bytes, status: int, names: str) -> None:
    found, message = refusal(LogProbBody, text)
    assert found == status
    assert message.startswith(names)
    assert "\n" not in message


@pytest.mark.parametrize("field", ['"u": 1.5', '"u": -0.1', '"u": NaN', '"mode": "median"', '"steps": 0'])
def test_denoise_refuses_what_it_cannot_do(field: str) -> None:
    status, message = refusal(DenoiseBody, '{"activations": [[1]], ' + field + "}")
    assert status == 422
    assert message.startswith(field.split('"')[1])


def test_sample_needs_a_count() -> None:
    assert refusal(SampleBody, "{}")[0] == 422
    assert refusal(SampleBody, '{"n": 0}')[0] == 422


def test_absurd_bodies_give_one_short_error() -> None:
    many_keys = ",".join(f'"k{i}": 0' for i in range(20_000))
    for text in (
        '{"activations": [[1]], ' + many_keys + "}",
        '{"activations": [[' + '"a",' * 100_000 + "1]]}",
    ):
        assert len(refusal(LogProbBody, text)[1]) < 200
    too_many = '{"activations": [' + "[1]," * 70_000 + "[1]]}"
    assert refusal(LogProbBody, too_many)[0] == 413


def test_integers_are_numbers_and_nulls_are_defaults() -> None:
    body = parse(LogProbBody, b'{"activations": [[1, 2.5]], "model": null, "layer": null, "ids": null}')
    assert body == parse(LogProbBody, GOOD.encode())
    assert body.activations == [[1.0, 2.5]]


@pytest.mark.parametrize("kind", BODIES)
def test_the_documented_examples_are_valid(kind: type[Body]) -> None:
    schema = request_schema(kind)["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert "$ref" not in json.dumps(schema)
    for example in schema["examples"]:
        parse(kind, json.dumps(example).encode())
