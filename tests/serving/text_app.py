"""An endpoint with the tiny language model attached: three priors, two of them of its activations, two directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from texts import make_texts

from dmm_ray.interventions import Direction
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.calibrate import calibrate
from dmm_ray.prior.calibration import Calibration
from dmm_ray.serving.config import AppConfig, Limits, ServeConfig
from dmm_ray.serving.serve import running
from dmm_ray.subject import SubjectModel

LIMITS = Limits(max_text_chars=2000, max_tokens=60, max_steps=2000)
TEXT = "the cat sat on a red mat and saw one big dog run to town"
CPUS = 0.25
TOKEN = "a-token-of-the-tests"
FLOAT32 = {"precision": "float32", "compute_dtype": "float32"}
"""On every machine: answers are compared with those of this process."""


@dataclass(frozen=True)
class Files:
    """What the endpoint is made of."""

    model: str
    directions: str
    default: str
    pair: str

    def config(self, kind: type[AppConfig], **options: Any) -> Any:
        """A configuration with the model; ``options`` go over it."""
        given = {"prior": self.default, "model": self.model, "directions": self.directions}
        return kind(**{**given, **FLOAT32, "cpus": CPUS, "subject_cpus": CPUS, "limits": LIMITS, **options})


def make_files(folder: Path, subject: Path) -> Files:
    """Untrained priors of layer 2, and of layers 1 and 3 with a calibration of 1, with the statistics of a text."""
    model = SubjectModel.from_pretrained(str(subject), head=True)
    for name, layers in (("default", (2,)), ("pair", (1, 3))):
        rows = torch.stack([model.read(TEXT, layer).rows[1:] for layer in layers])
        config = PriorConfig(
            d=32, layers=layers, subject_layers=4, d_model=32, d_mlp=64, n_blocks=1, variance_floor=1e-6
        )
        prior = ActivationPrior.untrained(config, rows.mean(1), rows.var(1), seed=len(layers))
        prior.save_pretrained(str(folder / name))
    _calibrate(model, prior, layer=1).save(str(folder / "pair"))
    Direction("up", torch.arange(32.0), layer=2).save(str(folder / "directions"))
    Direction("down", -torch.arange(32.0)).save(str(folder / "directions"))
    return Files(str(subject), *(str(folder / name) for name in ("directions", "default", "pair")))


def _calibrate(model: SubjectModel, prior: ActivationPrior, layer: int) -> Calibration:
    rows = [model.read(text, layer).rows[1:] for text in make_texts(20, seed=5, high=20)]
    ids = np.array([[doc, position + 1] for doc, found in enumerate(rows) for position in range(len(found))])
    return calibrate(prior, torch.cat(rows), ids, layer=layer, steps=4)


@contextmanager
def serving(files: Files, **options: Any) -> Iterator[str]:
    """The endpoint's address as long as the context lasts."""
    with running(files.config(ServeConfig, port=0, **options)) as url:
        yield url


@contextmanager
def beside(name: str, config: AppConfig) -> Iterator[str]:
    """Another application under ``/name`` of the endpoint that runs; its path."""
    from ray import serve

    from dmm_ray.serving.app import build

    serve.run(build(config), name=name, route_prefix=f"/{name}")
    try:
        yield f"/{name}"
    finally:
        serve.delete(name)
