from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmm_ray.serving.config import Limits
from dmm_ray.serving.deployments.calls import PriorInfo, check_finite, to_call
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.schemas import DenoiseBody, EncodeBody, LogProbBody, SampleBody

SINGLE = PriorInfo(d=2, layers=(7,), n_blocks=3, d_mlp=5, precision="float32", exact_trace=True)
SEVERAL = SINGLE._replace(layers=(1, 3))
X = [[1.0, 2.0], [3.0, 4.0]]


def refusal(body: Any, info: PriorInfo = SINGLE, **limits: int) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        to_call(body, info, Limits(**limits))
    return caught.value.status, caught.value.message


def test_rows_and_ids_are_arrays_of_fixed_types() -> None:
    call, rows = to_call(LogProbBody(activations=X, ids=[5, -6]), SINGLE, Limits())
    assert call.operation == "log_prob"
    assert dict(call.arguments) == {
        "layer": None, "steps": 32, "probes": 2, "seed": 0, "precision": None, "method": "midpoint", "grid": "cosine",
    }  # fmt: skip
    assert rows["activations"].dtype == np.float32
    assert rows["ids"].dtype == np.int64
    assert rows["ids"].tolist() == [[5, 0], [-6, 0]]


def test_ids_default_to_the_position_and_may_be_pairs() -> None:
    assert to_call(SampleBody(n=3), SINGLE, Limits())[1]["ids"].tolist() == [[0, 0], [1, 0], [2, 0]]
    body = LogProbBody.model_validate_json('{"activations": [[1, 2], [3, 4]], "ids": [[9, 1], [9, 2]]}')
    assert to_call(body, SINGLE, Limits())[1]["ids"].tolist() == [[9, 1], [9, 2]]


def test_a_level_of_each_row_s_own_shares_calls() -> None:
    x = [[0.0, 0.0], [1.0, 1.0]]
    one, rows = to_call(DenoiseBody(activations=x, u=[0.1, 0.2]), SINGLE, Limits())
    other, _ = to_call(DenoiseBody(activations=x, u=[0.5, 0.2]), SINGLE, Limits())
    assert one == other
    assert (rows["u"].dtype, rows["u"].tolist()) == (np.float64, [0.1, 0.2])
    for bad in ([0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(RequestError, match="u: expected one noise level, or one for each of the 2 rows"):
            to_call(DenoiseBody(activations=x, u=bad), SINGLE, Limits())


def test_only_equal_calls_share_a_key() -> None:
    key = to_call(DenoiseBody(activations=X), SINGLE, Limits())[0]
    assert (
        key == to_call(DenoiseBody(activations=[[0.0, 0.0]], ids=[4], model="default"), SINGLE, Limits())[0]
    )
    for other in ({"u": 0.4}, {"steps": 9}, {"mode": "mean"}, {"seed": 1}, {"layer": 7}):
        assert key != to_call(DenoiseBody(activations=X, **other), SINGLE, Limits())[0]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (LogProbBody(activations=[[1.0]]), "row 0 has 1 numbers; this prior's activations have d = 2"),
        (LogProbBody(activations=[[1.0, 2.0], [1.0, 2.0, 3.0]]), "row 1 has 3"),
        (LogProbBody(activations=[[]]), "row 0 has 0"),
        (LogProbBody(activations=[[0.0, 1e300]]), "activations.0.1"),
        (LogProbBody(activations=X, layer=8), "layer: this prior models layers 7 (got 8)"),
        (LogProbBody(activations=X, ids=[1]), "ids: expected one for each of the 2 rows"),
        (LogProbBody(activations=X, ids=[1, (2, 3)]), "ids: must be all integers or all"),
        (EncodeBody(activations=X, block=3), "block: this prior has blocks 0 to 2"),
    ],
)
def test_what_does_not_fit_the_prior_is_422(body: Any, names: str) -> None:
    status, message = refusal(body)
    assert status == 422
    assert names in message


def test_a_prior_of_several_layers_needs_one_of_them() -> None:
    assert refusal(SampleBody(n=1), SEVERAL) == (422, "layer: required; this prior models layers 1, 3")
    assert dict(to_call(SampleBody(n=1, layer=3), SEVERAL, Limits())[0].arguments)["layer"] == 3


def test_an_exact_trace_is_refused_where_the_prior_has_none() -> None:
    body = LogProbBody(activations=X, probes=0)
    to_call(body, SINGLE, Limits())
    assert refusal(body, SINGLE._replace(exact_trace=False))[0] == 422


@pytest.mark.parametrize(
    ("body", "limits", "names"),
    [
        (LogProbBody(activations=X), {"max_rows": 1}, "rows: 2 requested, at most 1"),
        (LogProbBody(activations=X, steps=9), {"max_steps": 8}, "steps: 9"),
        (LogProbBody(activations=X, probes=9), {"max_probes": 8}, "probes: 9"),
        (SampleBody(n=5), {"max_values": 9}, "numbers in the answer: 10"),
        (EncodeBody(activations=X), {"max_values": 29}, "numbers in the answer: 30"),
        (LogProbBody(activations=X, steps=10, probes=3), {"max_work": 99}, "row passes"),
        (LogProbBody(activations=X, steps=10, probes=0), {"max_work": 79}, "row passes"),
    ],
)
def test_limits_are_413(body: Any, limits: dict[str, int], names: str) -> None:
    status, message = refusal(body, **limits)
    assert status == 413
    assert names in message
    to_call(body, SINGLE, Limits(**{name: most + 1 for name, most in limits.items()}))


def test_an_answer_that_is_not_finite_names_its_row() -> None:
    check_finite({"nats": np.zeros(3), "stderr": np.full(3, np.nan)})
    with pytest.raises(RequestError, match="row 1"):
        check_finite({"activations": np.array([[0.0, 1.0], [np.inf, 0.0]])})
