"""Which language model is meant where a record names one, and the command another or none."""

from __future__ import annotations

import pytest

from dmm_ray.errors import UserError
from dmm_ray.subject.config import ModelSource

RECORD = ("us/model", "abc", "trunk.stages")


@pytest.mark.parametrize(
    ("asked", "model", "revision"),
    [
        (ModelSource(), "us/model", "abc"),
        (ModelSource(model="us/model"), "us/model", "abc"),
        (ModelSource(revision="def"), "us/model", "def"),
        (ModelSource(model="/moved"), "/moved", None),
    ],
)
def test_what_is_left_open_comes_from_the_record(
    asked: ModelSource, model: str, revision: str | None
) -> None:
    found = asked.recorded(*RECORD)
    assert (found.model, found.revision, found.block_path) == (model, revision, "trunk.stages")


def test_no_model_at_all_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^model: .* give --model"):
        ModelSource().recorded(None, None, None).resolve()
