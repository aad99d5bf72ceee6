"""Number formats of the network's matrix products."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from dmm_ray.errors import UserError

Precision = Literal["float32", "bfloat16"]
"""``float32``: as the weights are held. ``bfloat16``: products in bfloat16; states, sums and sinusoids in float32."""

_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None]


def check_precision(precision: str) -> None:
    """Raises UserError for another format than those of :data:`Precision`."""
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"precision: float32 or bfloat16 is needed (got {precision!r})")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products without TF32 (or bfloat16, on CPUs) inside, whatever the process has set; puts that back."""
    global _inside, _restore
    with _lock:
        if _inside == 0:
            _restore = _forbid_short_products()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def _forbid_short_products() -> Callable[[], None]:
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # the process has used torch's newer settings, which the older ones refuse to read
        return _forbid_by_backend()
    if previous != "highest":
        torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(previous) if previous != "highest" else None


def _forbid_by_backend() -> Callable[[], None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    previous = [backend.fp32_precision for backend in backends]

    def restore() -> None:
        for backend, value in zip(backends, previous, strict=True):
            backend.fp32_precision = value

    for backend in backends:
        backend.fp32_precision = "ieee"
    return restore
