"""Diffusion meta-models of language-model activations, on Ray.

``from dmm_ray import ActivationPrior, ActivationStore, SubjectModel``: each is imported on first use, and none of them
imports or starts Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmm_ray.prior.model import ActivationPrior
    from dmm_ray.store.reader import ActivationStore
    from dmm_ray.subject.model import SubjectModel

_WHERE = {
    "ActivationPrior": "dmm_ray.prior.model",
    "ActivationStore": "dmm_ray.store.reader",
    "SubjectModel": "dmm_ray.subject.model",
}
__all__ = ["ActivationPrior", "ActivationStore", "SubjectModel"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dmm_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
