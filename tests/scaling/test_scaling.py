"""A tiny grid on Ray: interrupted or not, the same cells; then the law, the plot and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from stores import extract_here
from texts import make_texts

from dmm_ray.errors import UserError
from dmm_ray.scaling.cell import RESULT, folder, run_cell
from dmm_ray.scaling.config import ScalingConfig
from dmm_ray.scaling.run import scaling


@pytest.fixture(scope="module")
def store(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    here = tmp_path_factory.mktemp("scaling")
    text = here / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(120, seed=3)))
    return extract_here(model=str(tiny_subject), text=str(text), layers=[2], out=str(here / "store"))


def config(store: str, out: Path, **changes: Any) -> ScalingConfig:
    fields = {
        "activations": store,
        "out": str(out),
        "sizes": ("32x1",),
        "samples": (512, 1536, 4608, 13824),
        "batch": 128,
        "precision": "float32",
        "max_rows": 1000,
        "lm_documents": 4,
        "resamples": 100,
    }
    return ScalingConfig.model_validate(fields | changes)


@pytest.mark.slow
def test_a_grid_is_run_resumed_and_fitted(ray_local: None, store: str, tmp_path: Path) -> None:
    this = config(store, tmp_path / "grid")
    before = {cell.name: run_cell(this, cell) for cell in this.cells[:3]}
    out = Path(scaling(this))
    summary = json.loads((out / "summary.json").read_text())
    cells = {c["name"]: c for c in summary["cells"]}
    assert list(cells) == [cell.name for cell in this.cells]
    assert {name: cells[name] for name in before} == before
    assert summary["frontier"] == list(cells)
    assert cells["32x1-13824"]["flops"] == pytest.approx(27 * cells["32x1-512"]["flops"])
    assert all(isinstance(c["delta_lm_loss"], float) for c in cells.values())
    low, high = summary["intervals"]["exponent"]
    assert low <= high
    assert (out / "scaling.png").stat().st_size > 10_000
    stamps = {c.name: Path(folder(this, c), RESULT).stat().st_mtime_ns for c in this.cells}
    assert scaling(this) == str(out)
    assert stamps == {c.name: Path(folder(this, c), RESULT).stat().st_mtime_ns for c in this.cells}
    with pytest.raises(UserError, match=r"^batch: .* was made with 128, not 64; choose another --out"):
        scaling(config(store, tmp_path / "grid", batch=64))


def test_a_grid_of_one_cell_is_refused(store: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match="sizes, samples: 1 cell; a law of three parameters needs at least 4"
    ):
        config(store, tmp_path, samples=(512,))
    with pytest.raises(ValidationError, match="sizes"):
        config(store, tmp_path, sizes=("wide",))


def test_a_model_or_text_that_is_not_there_is_refused_before_any_training(store: str, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    with pytest.raises(UserError, match="model: no folder at /nowhere/model"):
        scaling(config(store, out, model="/nowhere/model"))
    with pytest.raises(UserError, match="/nowhere/text"):
        scaling(config(store, out, text="/nowhere/text.jsonl"))
    assert not out.exists()
