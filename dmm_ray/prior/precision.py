"""Matrix products in the requested number format, whatever the process-wide settings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None]


@contextlib.contextmanager
def as_asked(device: torch.device) -> Iterator[None]:
    """Context in which products use the format of their factors: no TF32 (or bfloat16 on CPUs), no autocast."""
    with exact_float32(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Context in which float32 products use no TF32 (or bfloat16 on CPUs); restores the process's settings on exit."""
    global _inside, _restore
    # The settings are process-wide: the first thread to enter changes them, the last to leave restores them.
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
