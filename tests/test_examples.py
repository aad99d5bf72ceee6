"""The examples in the docstrings run as they stand there, in a folder with a small finished ``runs/demo``."""

from __future__ import annotations

import doctest
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import extract_here

from dmm_ray import ActivationPrior, ActivationStore, SubjectModel
from dmm_ray.demo.run import SUBJECT
from dmm_ray.demo.stories import write_corpus
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train

PACKAGE = Path(__file__).parents[1] / "dmm_ray"
ELSEWHERE = {"dmm_ray.client.client"}
"""Needs an endpoint: tests/serving/text_endpoint/test_client.py."""


def modules() -> list[str]:
    """Modules with examples, by name."""
    paths = [p for p in PACKAGE.rglob("*.py") if ">>> " in p.read_text(encoding="utf-8")]
    names = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in paths]
    return sorted(set(names) - ELSEWHERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, activations and prior of a demo that took seconds."""
    folder = tmp_path_factory.mktemp("examples")
    demo = folder / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(SUBJECT, demo / "model")
    write_corpus(str(folder / "stories.jsonl"), 60, seed=1)
    store = extract_here(
        model=str(demo / "model"),
        text=str(folder / "stories.jsonl"),
        layers=[2],
        out=str(demo / "activations"),
    )
    train(
        TrainConfig(
            activations=store,
            out=str(demo / "prior"),
            samples=1024,
            batch=256,
            levels_per_batch=64,
            n_blocks=1,
            workers=0,
            precision="float32",
            calibration_rows=64,
        )
    )
    return folder


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What examples may take for granted."""
    store = ActivationStore.open(str(folder / "runs" / "demo" / "activations"))
    rows = store.document(2, 0)
    return {
        "np": np,
        "torch": torch,
        "store": store,
        "prior": ActivationPrior.from_pretrained(str(folder / "runs" / "demo" / "prior")),
        "subject": SubjectModel.from_pretrained(str(SUBJECT), head=True),
        "x": rows.activation.float(),
        "ids": np.stack([rows.doc, rows.position], axis=1),
    }


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", modules())
def test_examples(name: str, names: dict[str, Any], there: None) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed
