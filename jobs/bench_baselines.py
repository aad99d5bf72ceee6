"""How well mixtures fit a store's activations; run by ``python jobs/bench.py baselines``.

For each size, prints the flow-matching loss on validation rows and on the mixture's own training rows, and the seconds
that fitting took. ``DMM_BENCH_STORE`` sets the store, which defaults to that of `make demo`, and ``DMM_BENCH_LAYER``
the layer, which defaults to the store's first.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from dmm_ray.gaussians import (
    Clusters,
    GaussianMixture,
    find_clusters,
    fit_analysers,
    fit_diagonal,
    fit_gaussian,
    flow_matching_loss,
)
from dmm_ray.prior.config import PriorConfig
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TRAIN, VALIDATION, Split
from dmm_ray.training.loader import store_normalizer

STORE = "runs/demo/activations"
ROWS, JUDGED = 400_000, 16_384
SIZES = ((2048, 0), (512, 8), (512, 16), (512, 32), (1024, 32), (1024, 64))
"""Components and rank; rank 0 is a rotated mixture of diagonal Gaussians."""


def bench(say: Callable[[str], None]) -> None:
    """Print one line per mixture."""
    store = ActivationStore.open(os.environ.get("DMM_BENCH_STORE", STORE))
    layer = int(os.environ.get("DMM_BENCH_LAYER", store.layers[0]))
    config = PriorConfig(d=store.d, layers=(layer,), d_model=2, d_mlp=1, n_blocks=1, variance_floor=1e-12)
    normalizer = store_normalizer(store, config)
    z, validation = (
        normalizer.normalize(store.select(layer, Split(), part, most, 0).activation)
        for part, most in ((TRAIN, ROWS), (VALIDATION, JUDGED))
    )
    say(f"baselines {store.uri} layer {layer}: {len(z):,} rows, d = {store.d}, {len(validation):,} held out")
    _line(say, "Gaussian", fit_gaussian(z), validation, z)
    clusters: dict[int, Clusters] = {}
    for components, rank in SIZES:
        if components * 20 > len(z) or rank >= store.d:
            say(f"baselines {components:5} x {rank:2}: too few rows or dimensions")
            continue
        if components not in clusters:
            clusters[components] = find_clusters(z, components)
        found = clusters[components]
        mixture = fit_analysers(z, found, rank) if rank else fit_diagonal(z, found)
        mixture.seconds += found.seconds
        _line(say, f"{components:5} x {rank:2}", mixture, validation, z)


def _line(
    say: Callable[[str], None], name: str, mixture: GaussianMixture, validation: Tensor, z: Tensor
) -> None:
    held_out, own = (
        flow_matching_loss(mixture, rows) for rows in (validation, z[:: max(1, len(z) // JUDGED)])
    )
    say(f"baselines {name:10}: loss {held_out:.4f}, on its training rows {own:.4f}, {mixture.seconds:6.1f} s")
