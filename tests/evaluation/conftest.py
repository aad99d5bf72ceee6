"""A store of a few thousand rows, a briefly trained prior of it, and options of a small evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stores import extract_here
from texts import make_texts

from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train

SPLIT = {"train": 0.8, "validation": 0.1, "test": 0.1}


@pytest.fixture(scope="session")
def eval_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents, the last 20 of which repeat the first 20."""
    path = tmp_path_factory.mktemp("eval_text") / "text.jsonl"
    texts = make_texts(180, seed=3)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, *texts[:20]]))
    return path


@pytest.fixture(scope="session")
def eval_store(tiny_subject: Path, eval_text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers 1 and 2 of the tiny subject, float32. Do not change it."""
    out = tmp_path_factory.mktemp("eval_store") / "store"
    return extract_here(
        model=str(tiny_subject),
        text=str(eval_text),
        layers=[1, 2],
        out=str(out),
        dtype="float32",
        rows_per_shard=2000,
    )


@pytest.fixture(scope="session")
def eval_prior(eval_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small prior of layer 1, trained for a moment."""
    out = tmp_path_factory.mktemp("eval_prior") / "prior"
    return train(
        TrainConfig(
            activations=eval_store,
            out=str(out),
            layer=1,
            samples=60_000,
            batch=256,
            d_model=64,
            d_mlp=128,
            n_blocks=2,
            lr=3e-3,
            split=SPLIT,
            workers=0,
            wandb="disabled",
        )
    )


@pytest.fixture
def options(eval_prior: str, eval_store: str, tmp_path: Path) -> dict[str, Any]:
    """Fields of a small evaluation."""
    return {
        "prior": eval_prior,
        "activations": eval_store,
        "out": str(tmp_path / "report"),
        "mixture_sizes": (4, 32),
        "analyser_sizes": (4,),
        "analyser_ranks": (2,),
        "sae_latents": 64,
        "sae_k": 8,
        "sae_lr": 5e-3,
        "sae_kinds": "topk",
        "sae_samples": 30_000,
        "lm_documents": 8,
        "lm_levels": (0.3,),
        "nll_rows": 32,
        "nll_steps": 8,
        "samples": 200,
        "sample_steps": 8,
        "two_sample_rows": 150,
        "device": "cpu",
    }


@pytest.fixture
def config(options: dict[str, Any]) -> EvaluateConfig:
    """The configuration of a small evaluation."""
    return EvaluateConfig(**options)
