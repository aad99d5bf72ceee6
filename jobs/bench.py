"""Reproducible benchmarks: ``python jobs/bench.py [NAME ...]``.

Names: extract, train, prior, solver, store, generate, serve, ood, baselines.

Each alternates with its baseline in the same run and prints medians: compare ratios, since machines are noisy. Without
a name, all are run except ``ood`` and ``baselines``, which require a finished `dmm demo` (docs/likelihood.md,
docs/benchmarks.md).
"""

from __future__ import annotations

import importlib
import sys

from dmm_ray.ray_session import quiet

quiet()  # OpenMP reads its settings when torch is imported, so set them first, to those `dmm` sets for other processes

import torch  # noqa: E402
from timing import say  # noqa: E402

BENCHES = {
    "extract": ("bench_extract",),
    "train": ("bench_train", "bench_loader"),
    "prior": ("bench_prior",),
    "solver": ("bench_solver",),
    "store": ("bench_store",),
    "generate": ("bench_generate",),
    "serve": ("bench_serve",),
    "ood": ("bench_ood",),
    "baselines": ("bench_baselines",),
}
"""Modules next to this file, each with ``bench(say)``."""
ASKED_FOR = {"ood", "baselines"}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(BENCHES)
    if unknown:
        sys.stderr.write(f"bench: no benchmark {sorted(unknown)[0]}; one of {', '.join(BENCHES)}\n")
        sys.exit(2)
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or [name for name in BENCHES if name not in ASKED_FOR]:
        for module in BENCHES[name]:
            importlib.import_module(module).bench(say)
