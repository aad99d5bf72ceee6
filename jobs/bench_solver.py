"""Errors of the solver and of the trace estimate, ``python jobs/bench.py solver``.

Errors of every method and grid by number of evaluations, on Gaussians of known covariance, a mixture with its exact
score, and trained priors against a fine reference; the spread of the trace estimate by number of probes; the error due
to bfloat16; samples at 20 evaluations next to Euler's at 100. ``DMM_BENCH_PRIORS=folder=store,..`` uses your own
single-layer priors (and the test rows of their stores) instead of two trained here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from known import Mixture, gaussian, mixture, spread, trained
from scipy.stats import spearmanr
from timing import precisions
from torch import Tensor

from dmm_ray.evaluation.samples import frechet_distance, two_sample_auc
from dmm_ray.prior import ActivationPrior, Solver
from dmm_ray.prior.noise import rademacher
from dmm_ray.prior.solver import TABLEAUX, Traced, Velocity
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TEST, Split

Say = Callable[[str], None]
Draw = Callable[[int, int], Tensor]
"""(seed, number of the evaluation) -> probes (K, n, d)."""
EVALUATIONS = (16, 32, 64, 128)
LEVELS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
EXACT_TRACE_D = 128


class Known(NamedTuple):
    """A prior and rows from its data distribution, (n, d) raw."""

    name: str
    prior: ActivationPrior
    rows: Tensor


def bench(say: Say, small: bool = False) -> None:
    """Run all parts; ``small`` only checks that it runs."""
    for d in (64,) if small else (64, 1024, 4096):
        data = gaussian(d)
        closed_form(say, f"Gaussian d={d}", data, data.sample(8 if small else 128))
    data = mixture(64, 16)
    closed_form(say, "mixture d=64", data, data.sample(8 if small else 128))
    for known in priors(small):
        solver_errors(say, known, 4 if small else 32, 16 if small else 512)
        probe_spread(say, known, 4 if small else 24, 2 if small else 8)
        if "bfloat16" in precisions():
            half_precision(say, known, 8 if small else 128)
        denoise_curves(say, known, 8 if small else 512)
        sample_quality(say, known, 300 if small else 4000)


def closed_form(say: Say, name: str, data: Mixture, z: Tensor) -> None:
    """Every solver against the exact density, with exact traces."""
    exact = data.log_prob(z)
    say(
        f"solver {name}: natural spread {spread(exact):.1f} nats; error spread (bias per dimension) by evaluations"
    )
    _table(say, name, data.velocity, data.velocity_and_trace, z, exact)


def solver_errors(say: Say, known: Known, rows: int, fine: int) -> None:
    """Every solver against RK4 with ``fine`` steps; if the trace is not exact, both use the same held probes."""
    prior = known.prior
    z = prior.normalizer.normalize(known.rows[:rows])
    field = prior.velocities.field(prior.denoiser, 0)
    exactly = prior.d <= EXACT_TRACE_D
    basis = torch.eye(prior.d, device=z.device)[:, None].expand(-1, rows, -1)
    tangents = basis if exactly else probes(z, 2)
    traced = with_tangents(field.tangents, lambda _: tangents, exactly)
    exact = log_density(field, traced, z, Solver("rk4"), fine)
    say(
        f"solver {known.name}: natural spread {spread(exact):.1f} nats; against RK4 with {4 * fine} evaluations"
    )
    _table(say, known.name, field, traced, z, exact)


def _table(say: Say, name: str, velocity: Velocity, traced: Traced, z: Tensor, exact: Tensor) -> None:
    for method, grid in product(TABLEAUX, ("uniform", "cosine")):
        solver, found = Solver(method, grid), []  # type: ignore[arg-type]
        for evaluations in EVALUATIONS:
            error = log_density(velocity, traced, z, solver, evaluations // solver.stages) - exact
            found.append(f"{evaluations:4d}: {spread(error):7.3f} ({float(error.mean()) / z.shape[1]:+.5f})")
        say(f"solver {name:16} {method:8} {grid:7} {'  '.join(found)}")


def log_density(velocity: Velocity, traced: Traced, z: Tensor, solver: Solver, steps: int) -> Tensor:
    """``log p(z)``, (n,) float64, in normalised space."""
    z_1, divergence, _ = solver.integrate_with_trace(velocity, traced, z, solver.points(0.0, 1.0, steps))
    constant = 0.5 * z.shape[1] * float(np.log(2 * np.pi))
    return divergence - 0.5 * z_1.double().square().sum(1) - constant


def with_tangents(
    tangents: Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]],
    drawn: Callable[[int], Tensor],
    exact: bool = False,
) -> Traced:
    """A trace from ``drawn`` vectors (K, n, d) at each evaluation: the mean of their quadratic forms, or, for a basis
    (``exact``), the sum."""

    def traced(z: Tensor, u: float, number: int) -> tuple[Tensor, Tensor, Tensor]:
        t_KND = drawn(number)
        velocity, along = tangents(z, u, t_KND)
        forms = (along * t_KND).sum(2).double()
        return velocity, forms.sum(0) if exact else forms.mean(0), torch.zeros_like(forms[0])

    return traced


def probes(z: Tensor, count: int, number: int = 0, seed: int = 0) -> Tensor:
    """Rademacher probes (count, n, d) for rows z (n, d)."""
    n, d = z.shape
    ids = torch.arange(n, device=z.device)
    return torch.stack([rademacher(seed, ids, d, stream=1000 * (number + 1) + k) for k in range(count)])


def probe_spread(say: Say, known: Known, rows: int, seeds: int) -> None:
    """The estimate's standard deviation over seeds: probes fresh, held, and fresh in the covariance's eigenbasis."""
    prior = known.prior
    z = prior.normalizer.normalize(known.rows[:rows])
    basis = torch.linalg.eigh(torch.cov(prior.normalizer.normalize(known.rows).T))[1].T
    best = None
    for count in (16, 4, 2, 1):
        draws: dict[str, Draw] = {
            "fresh": lambda seed, number, c=count: probes(z, c, number, seed),
            "held": lambda seed, number, c=count: probes(z, c, 0, seed),
            "rotated": lambda seed, number, c=count: probes(z, c, number, seed) @ basis,
        }
        found = {name: estimates(prior, z, draw, seeds) for name, draw in draws.items()}
        best = found["fresh"].mean(0) if best is None else best
        rank = float(spearmanr(found["fresh"][0].cpu(), best.cpu()).statistic)
        parts = [f"{name} {float(f.var(0).mean().sqrt()):7.3f}" for name, f in found.items()]
        say(
            f"solver {known.name:16} {count:2d} probes, standard deviation in nats (natural {spread(best):.1f}): "
            f"{', '.join(parts)}; rank correlation with {16 * seeds} probes {rank:.3f}"
        )


def estimates(prior: ActivationPrior, z: Tensor, draw: Draw, seeds: int) -> Tensor:
    """log p (seeds, n) by the default solver, with probes from ``draw(seed, number of the evaluation)``."""
    field, found = prior.velocities.field(prior.denoiser, 0), []
    for seed in range(seeds):
        traced = with_tangents(field.tangents, functools.partial(draw, seed))
        found.append(log_density(field, traced, z, Solver(), 32))
    return torch.stack(found)


def half_precision(say: Say, known: Known, rows: int) -> None:
    """The effect of bfloat16 products on the same estimate."""
    full = known.prior.log_prob(known.rows[:rows], probes=1)
    half = known.prior.log_prob(known.rows[:rows], probes=1, precision="bfloat16")
    error = half.nats - full.nats
    say(
        f"solver {known.name:16} bfloat16: error spread {spread(error):.3f} nats, bias {float(error.mean()):+.3f}, "
        f"natural spread {spread(full.nats):.1f}"
    )


def denoise_curves(say: Say, known: Known, rows: int) -> None:
    """How far denoising moves natural rows, and how far denoising the result moves it again, by level.

    Median over rows of the distance moved in normalised space, relative to the row's distance from the mean.
    """
    prior, x = known.prior, known.rows[:rows]

    def moved(after: Tensor, before: Tensor) -> float:
        z_after, z_before = prior.normalizer.normalize(after), prior.normalizer.normalize(before)
        return float(((z_after - z_before).norm(dim=1) / z_before.norm(dim=1)).median())

    for mode in ("sample", "mean"):
        found = []
        for u in LEVELS:
            once = prior.denoise(x, u=u, mode=mode, seed=1)  # type: ignore[arg-type]
            twice = prior.denoise(once, u=u, mode=mode, seed=2)  # type: ignore[arg-type]
            found.append(f"{u}: {moved(once, x):.3f} then {moved(twice, once):.3f}")
        say(f"solver {known.name:16} denoise, {mode:6} moves by, at level  {'  '.join(found)}")


def sample_quality(say: Say, known: Known, n: int) -> None:
    """Frechet distance (normalised space) and two-sample AUC of samples by solver, and of real rows against others."""
    prior = known.prior
    real = prior.normalizer.normalize(known.rows)
    half = len(real) // 2
    ways = {
        "default, 20 evaluations": {"steps": 10},
        "default, 40 evaluations": {"steps": 20},
        "Euler, 20 evaluations": {"steps": 20, "solver": Solver("euler", "uniform")},
        "Euler, 100 evaluations": {"steps": 100, "solver": Solver("euler", "uniform")},
    }
    sets = {name: prior.normalizer.normalize(prior.sample(n, **how)) for name, how in ways.items()}  # type: ignore[arg-type]
    sets["real rows"] = real[half:]
    for name, drawn in sets.items():
        auc = two_sample_auc(real[:half], np.arange(half), drawn, min(n, half), 0)
        say(
            f"solver {known.name:16} samples, {name:24} FD {frechet_distance(real[:half], drawn):8.3f}, AUC {auc:.3f}"
        )


def priors(small: bool) -> list[Known]:
    """The priors of DMM_BENCH_PRIORS, or two trained here."""
    if named := os.environ.get("DMM_BENCH_PRIORS"):
        return [_opened(*item.split("=", 1)) for item in named.split(",")]
    made = [("trained d=64", mixture(64, 64), (256, 512, 3), 20 if small else 600)]
    if not small:
        made.append(("trained d=1024", mixture(1024, 64), (512, 1024, 2), 400))
    return [Known(name, *trained(data, shape, batches)) for name, data, shape, batches in made]


def _opened(folder: str, store: str) -> Known:
    prior = ActivationPrior.from_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    split = Split.model_validate(prior.config.split)
    rows = ActivationStore.open(store).select(prior.layers[0], split, TEST, max_rows=8000)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows.activation)))
    return Known(f"{folder} d={prior.d}", prior, rows.activation[order].float().to(prior.device))
