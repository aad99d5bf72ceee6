from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmm_ray.provenance import with_provenance, write_summary


def test_results_stand_beside_where_they_come_from(tmp_path: Path) -> None:
    write_summary(str(tmp_path), {"figures": {"loss": 0.5}, "prior_hash": "abc"}, {"seed": 1}, 1.23456)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == with_provenance({"figures": {"loss": 0.5}, "prior_hash": "abc"}, {"seed": 1}, 1.235)
    assert set(found) == {"figures", "prior_hash", "inputs", "versions", "seconds"}
    assert {"python", "torch", "dmm-ray"} <= found["versions"].keys()


def test_a_number_that_json_cannot_hold_is_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(str(tmp_path), {"figures": {"loss": float("nan")}}, {}, 1.0)
    assert not list(tmp_path.iterdir())
