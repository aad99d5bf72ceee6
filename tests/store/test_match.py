"""What is refused and what brings a warning where priors, stores and language models meet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.store.match import check_finite, check_fits, check_subject
from dmm_ray.store.reader import ActivationStore, Rows


@pytest.fixture
def store(tiny_store: Path) -> ActivationStore:
    return ActivationStore.open(str(tiny_store))


def modelled(store: ActivationStore, **changes: Any) -> Any:
    """What a prior of layer 1 of the store says of itself."""
    entry = store.manifest.subject
    known = {"id": entry.id, "revision": entry.revision, "weights_hash": entry.weights_hash}
    return SimpleNamespace(**{"d": store.d, "layers": (1,), "subject": known} | changes)


def test_the_shared_layers(store: ActivationStore, caplog: pytest.LogCaptureFixture) -> None:
    assert check_fits(modelled(store), store) == [1]
    assert check_fits(modelled(store, layers=(0, 1, 2)), store) == [1, 2]
    assert check_fits(modelled(store, layers=(0, 1, 2)), store, 2) == [2]
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "layer", "says"),
    [
        ({"d": 16}, None, "activations: .* has d = 32, but the prior models d = 16; give a store extracted"),
        ({"layers": (3,)}, None, "layer: .* has layers 1, 2, but the prior models 3; extract that layer"),
        ({"layers": (0, 1)}, 0, "layer: .* has layers 1, 2, but the prior models 0, 1; extract"),
        ({}, 2, "layer: .* the prior models 1"),
    ],
)
def test_another_width_or_layer_is_refused(
    store: ActivationStore, changes: dict[str, Any], layer: int | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        check_fits(modelled(store, **changes), store, layer)


def test_another_model_is_refused_only_for_statements_about_the_prior(
    store: ActivationStore, caplog: pytest.LogCaptureFixture
) -> None:
    other = modelled(store, subject={"id": "elsewhere", "weights_hash": "0" * 64})
    assert check_fits(other, store) == [1]
    assert f"{store.manifest.subject.id}, but the prior was trained on elsewhere" in caplog.text
    with pytest.raises(UserError, match=r"trained on elsewhere .*; give a store of that model"):
        check_fits(other, store, same_model=True)


@pytest.mark.parametrize(
    ("known", "model", "warns"),
    [
        ({"id": "us/base"}, "us/chat", True),
        ({"id": "us/base"}, "us/base", False),
        ({"id": "us/base"}, "/models/base", False),
        ({}, "us/chat", False),
    ],
)
def test_a_prior_without_a_hash_goes_by_hub_ids(
    caplog: pytest.LogCaptureFixture, known: dict[str, str], model: str, warns: bool
) -> None:
    subject = SimpleNamespace(d=8, n_layers=2, model_id=model, revision=None, weights_hash="1" * 64)
    check_subject(SimpleNamespace(d=8, layers=(1,), subject=known), subject, "prior")
    assert ("trained on us/base" in caplog.text) == warns


def test_a_language_model_is_hashed_only_where_no_commit_says_that_it_is_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Model(SimpleNamespace):
        @property
        def weights_hash(self) -> str:
            if self.revision == "abc":
                pytest.fail("hashed")
            return "1" * 64

    about = {"id": "us/base", "revision": "abc", "weights_hash": "0" * 64}
    prior = SimpleNamespace(d=8, layers=(1,), subject=about)
    check_subject(prior, Model(d=8, n_layers=2, model_id="us/base", revision="abc"), "prior")
    assert not caplog.records
    check_subject(prior, Model(d=8, n_layers=2, model_id="us/base", revision="def"), "prior")
    assert "trained on us/base (weights 111111111111, not 000000000000)" in caplog.text


@pytest.mark.parametrize(("d", "layers"), [(8, (2,)), (16, (1,))])
def test_a_language_model_of_another_shape_is_refused(d: int, layers: tuple[int, ...]) -> None:
    subject = SimpleNamespace(d=8, n_layers=2, model_id="m", revision=None, weights_hash="")
    with pytest.raises(UserError, match=r"model: m \(d = 8, 2 layers\) does not match prior p "):
        check_subject(SimpleNamespace(d=d, layers=layers, subject={}), subject, "p")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_inf_and_nan_are_refused(store: ActivationStore, dtype: torch.dtype) -> None:
    n = 700_000
    rows = Rows(torch.zeros(n, 1, dtype=dtype), np.arange(n), np.arange(n), np.arange(n))
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
    rows.activation[-4:, 0] = torch.tensor([largest, -largest, smallest, -0.0])
    check_finite(store, 0, rows)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        rows.activation[-2] = value
        with pytest.raises(UserError, match=f"NaN or Inf at document {n - 2}, position {n - 2}; extract"):
            check_finite(store, 0, rows)


def test_no_rows_are_finite(store: ActivationStore) -> None:
    check_finite(store, 1, Rows(torch.zeros(0, 32), np.empty(0), np.empty(0), np.empty(0)))
