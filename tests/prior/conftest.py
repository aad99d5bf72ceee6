"""Small products run on one thread: two wait for one another longer than they work, on a busy machine above all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from shape_checks import check_shapes

assert check_shapes("dmm_ray.prior")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
