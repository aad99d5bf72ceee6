"""The text routes over real HTTP, against the same done in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serving.text_app import TEXT, TOKEN, Files

from dmm_ray.errors import UserError
from dmm_ray.interventions import Direction, Steering, load_directions
from dmm_ray.prior import ActivationPrior
from dmm_ray.serving.deployments.subject import SubjectDeployment
from dmm_ray.subject import Generation, SubjectModel

PROMPT = "the cat sat"
GENERATE = {
    "prompt": PROMPT,
    "direction": "up",
    "strength": 0.6,
    "u": 0.3,
    "max_tokens": 9,
    "steps": 3,
    "seed": 4,
}


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as c:
        yield c


@pytest.fixture(scope="module")
def model(files: Files) -> SubjectModel:
    return SubjectModel.from_pretrained(files.model, head=True)


def post(client: httpx.Client, route: str, body: dict[str, Any]) -> Any:
    answer = client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(client: httpx.Client, route: str, body: dict[str, Any]) -> tuple[int, str]:
    answer = client.post(f"/v1/{route}", content=json.dumps(body))
    assert list(answer.json()) == ["error"], answer.text
    return answer.status_code, answer.json()["error"]


def events(text: str) -> list[tuple[str, Any]]:
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


@pytest.mark.parametrize(("name", "layer"), [(None, None), ("pair", 1), ("pair", 3)])
def test_a_text_s_tokens_have_their_rows_log_probabilities(
    client: httpx.Client, files: Files, model: SubjectModel, name: str | None, layer: int | None
) -> None:
    text = TEXT + " \u65e5\u672c"
    body = {"text": text, "model": name, "layer": layer, "steps": 4, "probes": 2, "seed": 3}
    found = post(client, "score_text", body)["tokens"]
    reading = model.read(text, layer or 2)
    assert [(t["text"], t["start"], t["end"]) for t in found] == [p[1:] for p in reading.pieces]
    assert (found[0]["nats"], found[0]["percentile"]) == (None, None)
    prior = ActivationPrior.from_pretrained(files.pair if name else files.default)
    ids = np.array([[0, position] for position in range(1, len(found))])
    expected = prior.log_prob(reading.rows[1:], layer=layer, steps=4, probes=2, ids=ids, seed=3)
    np.testing.assert_allclose([t["nats"] for t in found[1:]], expected.nats, rtol=1e-4, atol=1e-3)
    percentiles = [t["percentile"] for t in found[1:]]
    if layer == 1:  # the only calibrated one
        assert expected.percentile is not None
        np.testing.assert_allclose(percentiles, expected.percentile, atol=0.1)
    else:
        assert percentiles == [None] * len(percentiles)


def test_a_single_token_is_position_zero(client: httpx.Client) -> None:
    (token,) = post(client, "score_text", {"text": "<s>"})["tokens"]
    assert (token["text"], token["nats"]) == ("<s>", None)


@pytest.mark.parametrize("project", [True, False])
def test_generation_is_that_of_the_package(
    client: httpx.Client, files: Files, model: SubjectModel, project: bool
) -> None:
    found = post(client, "generate", {**GENERATE, "project": project})
    prior = ActivationPrior.from_pretrained(files.default)
    direction = load_directions(files.directions)["up"]
    steering = Steering(prior, direction, 0.6, 0.3 if project else None, 3, seed=4)
    expected = Generation(model, PROMPT, [steering.intervention()], max_tokens=9, seed=4)
    assert [t["id"] for t in found["tokens"]] == [token.id for token in expected]
    assert (found["text"], found["finish"]) == (expected.text, expected.finish)
    np.testing.assert_allclose([t["nats"] for t in found["tokens"]], expected.nats(), rtol=1e-4, atol=1e-4)
    assert found["nll"] == pytest.approx(np.mean(expected.nats()), rel=1e-4)
    given = Direction("mine", direction.vector * 7)
    sent = {**GENERATE, "project": project, "direction": given.vector.tolist()}
    assert post(client, "generate", sent)["text"] == found["text"]


def test_steering_and_projection_do_something(client: httpx.Client) -> None:
    plain = {**GENERATE, "direction": None, "project": False}
    texts = [
        post(client, "generate", body)["text"] for body in (plain, {**GENERATE, "project": False}, GENERATE)
    ]
    assert len(set(texts)) == 3


def test_events_are_the_answer_in_parts(client: httpx.Client) -> None:
    whole = post(client, "generate", GENERATE)
    with client.stream("POST", "/v1/generate", json={**GENERATE, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *tokens, (last, total) = events(answer.read().decode())
    assert last == "done"
    assert total == whole
    assert [kind for kind, _ in tokens] == ["token"] * len(whole["tokens"])
    assert [(t["id"], t["text"]) for _, t in tokens] == [(t["id"], t["text"]) for t in whole["tokens"]]


def test_a_client_that_leaves_ends_its_generation(client: httpx.Client) -> None:
    """The language model takes one request at a time here: the next one waits for the end of the one before."""
    slow = {**GENERATE, "steps": 1500, "max_tokens": 50, "stream": True}
    with client.stream("POST", "/v1/generate", json=slow) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        start = time.monotonic()
        for _ in range(3):
            next(chunks)
        token_s = (time.monotonic() - start) / 3
    start = time.monotonic()
    post(client, "nearest_tokens", {"n": 1})
    assert time.monotonic() - start < 15 * token_s  # it had 46 tokens to go


def test_near_tokens_are_the_lens_s(client: httpx.Client, files: Files, model: SubjectModel) -> None:
    prior = ActivationPrior.from_pretrained(files.default)
    rows = prior.sample(3, steps=4, seed=2)
    drawn = post(client, "nearest_tokens", {"n": 3, "steps": 4, "seed": 2, "top": 4})["rows"]
    given = post(client, "nearest_tokens", {"activations": rows.tolist(), "top": 4})["rows"]
    p, ids = torch.softmax(model.lens(rows), dim=1).topk(4)
    for found in (drawn, given):
        assert [[t["id"] for t in row] for row in found] == ids.tolist()
        np.testing.assert_allclose([[t["probability"] for t in row] for row in found], p, rtol=1e-3)
    assert drawn[0][0]["text"] == model.token_text(int(ids[0, 0]))


def test_what_is_here_can_be_asked(client: httpx.Client) -> None:
    directions = [{"name": "down", "layer": None}, {"name": "up", "layer": 2}]
    assert client.get("/v1/directions").json() == {"directions": directions}
    found = client.get("/v1/models").json()
    assert [(m["name"], m["d"], m["layers"]) for m in found["models"]] == [
        ("default", 32, [2]),
        ("pair", 32, [1, 3]),
        ("other", 16, [2]),
    ]
    assert {m["precision"] for m in found["models"]} == {"float32"}
    assert found["subject"]["generates"] is True
    assert found["subject"]["priors"] == ["default", "pair"]
    assert found["subject"]["context"] == 64
    assert "/" not in found["subject"]["name"]


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("score_text", {"text": ""}, 422, "text"),
        ("score_text", {"text": " \n "}, 422, "no tokens"),
        ("score_text", {"text": "x" * 2001}, 413, "2001 characters, at most 2000"),
        ("score_text", {"text": "cat " * 100}, 413, "context of 64"),
        ("score_text", {"text": TEXT, "steps": 2001}, 413, "steps"),
        ("score_text", {"text": TEXT, "layer": 3}, 422, "layer: this prior models 2"),
        ("score_text", {"text": TEXT, "model": "pair"}, 422, "layer"),
        ("score_text", {"text": TEXT, "model": "other"}, 422, "not a prior of this language model"),
        ("score_text", {"text": TEXT, "model": "absent"}, 404, "no such prior"),
        ("score_text", {"text": TEXT, "ids": [1]}, 422, "ids: unknown field"),
        ("score_text", {"text": "\ud800"}, 400, "body"),
        ("generate", {**GENERATE, "direction": "../up"}, 422, "no such direction"),
        ("generate", {**GENERATE, "direction": [1.0, 2.0]}, 422, "2 numbers"),
        ("generate", {**GENERATE, "direction": [0.0] * 32}, 422, "not all zero"),
        ("generate", {**GENERATE, "model": "pair", "layer": 1}, 422, "belongs to layer 2"),
        ("generate", {**GENERATE, "max_tokens": 61}, 413, "max_tokens"),
        ("generate", {**GENERATE, "steps": 5000}, 413, "steps"),
        ("generate", {**GENERATE, "u": 1.5}, 422, "u:"),
        ("generate", {**GENERATE, "temperature": -1}, 422, "temperature"),
        ("generate", {**GENERATE, "strength": "much"}, 422, "strength"),
        ("generate", {**GENERATE, "prompt": " ", "stream": True}, 422, "prompt: it contains no tokens"),
        ("generate", {**GENERATE, "prompt": "cat " * 100}, 413, "prompt: fills the model's context"),
        ("nearest_tokens", {}, 422, "exactly one"),
        ("nearest_tokens", {"n": 1, "activations": [[1.0]]}, 422, "exactly one"),
        ("nearest_tokens", {"n": 65}, 422, "n:"),
        ("nearest_tokens", {"activations": [[1.0], [1.0, 2.0]]}, 422, "equal length"),
        ("nearest_tokens", {"activations": [[1.0]]}, 422, "d = 32"),
        ("nearest_tokens", {"activations": [[1e39] * 32]}, 422, "too large"),
        ("nearest_tokens", {"activations": [[1.0] * 32, [3e38] * 32]}, 422, "row 1 is too large"),
    ],
)
def test_wrong_requests_are_told_the_field(
    client: httpx.Client, route: str, body: dict[str, Any], status: int, words: str
) -> None:
    found, message = refusal(client, route, body)
    assert (found, "\n" in message) == (status, False)
    assert words in message
    post(client, "nearest_tokens", {"n": 1, "steps": 1})


def test_the_documentation_has_examples(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for route in ("score_text", "generate", "nearest_tokens"):
        described = paths[f"/v1/{route}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert described["examples"]
    assert {"/v1/models", "/v1/directions"} <= set(paths)


def test_without_a_language_model_the_routes_say_so(client: httpx.Client, guarded: str) -> None:
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    for route, body in (
        ("score_text", {"text": TEXT}),
        ("generate", GENERATE),
        ("nearest_tokens", {"n": 1}),
    ):
        answer = client.post(f"{guarded}/v1/{route}", json=body)
        assert answer.status_code == 404
        assert "--model" in answer.json()["error"]
    assert client.get(f"{guarded}/v1/directions").status_code == 404
    assert client.get(f"{guarded}/v1/models").json()["subject"] is None


def test_what_does_not_fit_the_language_model_is_refused_at_the_start(
    files: Files, single: str, tmp_path: Path
) -> None:
    start = SubjectDeployment.func_or_class
    with pytest.raises(UserError, match=r"d = 32.* does not match prior .*d = 16"):
        start(files.model, None, {"default": single}, "cpu", ("float32", "float32"), 1)
    Direction("short", torch.ones(5)).save(str(tmp_path))
    with pytest.raises(UserError, match="directions: short has 5 numbers; the model's d is 32"):
        start(files.model, str(tmp_path), {"default": files.default}, "cpu", ("float32", "float32"), 1)


def test_the_http_side_needs_no_torch() -> None:
    modules = "http.text_routes, dmm_ray.serving.http.page, dmm_ray.serving.deployments.subject"
    check = f"import dmm_ray.serving.{modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
