"""Flags of ``dmm extract`` that hold lists, choices and mappings."""

from __future__ import annotations

from typing import Any

import pytest

from dmm_ray.cli import parse
from dmm_ray.errors import UserError

NEEDED = ["--model", "m", "--text", "t", "--layers", "[1]", "--out", "o"]


@pytest.mark.parametrize(
    ("flag", "value", "found"),
    [
        ("exclude", "[outliers]", ("outliers",)),
        ("exclude", "[outliers,nonfinite]", ("outliers", "nonfinite")),
        ("exclude", "nonfinite", ("nonfinite",)),
        ("tokens_per_doc", "last", "last"),
        ("tokens_per_doc", "3", 3),
        ("long_documents", "split", "split"),
        ("max_position", "7", 7),
        ("max_memory", '{"0": "70GiB", "cpu": "1GiB"}', {"0": "70GiB", "cpu": "1GiB"}),
        ("device_map", "auto", "auto"),
    ],
)
def test_read(flag: str, value: str, found: Any) -> None:
    _, config = parse("extract", [*NEEDED, f"--{flag.replace('_', '-')}", value])
    group = type(config).owners().get(flag)
    read = getattr(config if group is None else getattr(config, group), flag)
    assert (tuple(read) if isinstance(read, list) else read) == found


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--exclude", "[bogus]"], r"^exclude.* 'nonfinite' or 'outliers' \(got 'bogus'\)$"),
        (["--tokens-per-doc", "first"], r"^tokens_per_doc.*\(got 'first'\)$"),
        (["--tokens-per-doc", "0"], r"^tokens_per_doc.*\(got '0'\)$"),
        (["--long-documents", "skip"], r"^long_documents: .* 'cut' or 'split' \(got 'skip'\)$"),
        (["--max-memory", "70GiB"], "max_memory: "),
        (["--min-position", "9", "--max-position", "3"], "max_position 3 is less than min_position 9"),
    ],
)
def test_refused_in_one_line(flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        parse("extract", [*NEEDED, *flags])
    assert "\n" not in str(refused.value)
