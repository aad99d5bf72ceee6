"""Mixtures of Gaussians with closed forms at every noise level: velocity, divergence, posterior mean, log density.

Path: ``z_u = (1 - u) z + u * noise``; the velocity is ``E[noise - z | z_u]``. Shapes: N rows, D dimensions,
K components, R factors per component. Computed in float32, or in the dtype that the buffers are cast to.

With ``a = 1 - u``, ``x = z_u - a m`` and component covariance ``C = diag(v) + F^T F``, the covariance of ``z_u`` is
``S = a^2 C + u^2 I = diag(s) + a^2 F^T F``, ``s = a^2 v + u^2``. With ``L L^T = I + a^2 F diag(1/s) F^T`` and
``G = L^-1 F diag(1/s)`` (R, D), the Woodbury identity reduces everything to a diagonal and one projection ``y = G x``::

    S^-1                     = diag(1/s)         - a^2 G^T G
    velocity factor          = diag(gain(v, u))  - a u G^T G        velocity = -m + factor x
    posterior-mean factor    = diag(shrink(v, u)) + a u^2 G^T G     mean     =  m + factor x

None of them divides by u or 1 - u, so both ends are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmm_ray.gaussians.levels import gain, map_levels, shrink
from dmm_ray.seeds import torch_rng

LOG_2PI = math.log(2 * math.pi)
CERTAIN = 1 - 1e-7
"""Responsibilities of at least this are treated as 1, which they are up to float32 rounding."""
MIXTURE_FLOATS = 1 << 24
"""The intermediate tensors of a chunk of rows have about this many elements."""


class GaussianMixture(nn.Module):
    """``sum_k w_k N(mean_k, B (diag variance_k + F_k^T F_k) B^T)`` with an orthonormal basis B shared by all.

    Means, variances and factors are coordinates in that basis. Without factors (R = 0) it is a mixture of diagonal
    Gaussians in the basis; with them, a mixture of factor analysers.

    Args:
        weights: (K,), positive, summing to 1.
        means: (K, D).
        variances: (K, D), positive.
        factors: (K, R, D), or None for R = 0.
        basis: (D, D), one direction per column, or None for the rows' own axes.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
        >>> mixture.velocity(torch.tensor([[2.0, 0.0]]), 1.0)
        tensor([[2., 0.]])
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    factors: Tensor
    basis: Tensor | None
    seconds: float = 0.0
    """Time taken to fit it."""

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        factors: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        super().__init__()
        components, d = means.shape
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("factors", means.new_zeros(components, 0, d) if factors is None else factors)
        self.register_buffer("basis", basis)

    @property
    def components(self) -> int:
        """The number of Gaussians, K."""
        return len(self.weights)

    @property
    def rank(self) -> int:
        """The number of factors per component, R."""
        return self.factors.shape[1]

    @property
    def n_parameters(self) -> int:
        """Number of fitted parameters; a basis counts as the d (d - 1) / 2 of a rotation."""
        d = self.means.shape[1]
        own = self.weights.numel() - 1 + self.means.numel() + self.variances.numel() + self.factors.numel()
        return own + (0 if self.basis is None else d * (d - 1) // 2)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of a velocity, two per multiply-add; computing the tables of a level is not counted."""
        d = self.means.shape[1]
        turn = 0 if self.basis is None else 4 * d * d
        return self.components * d * (8 + 4 * self.rank) + turn

    def at(self, u: float) -> NoisedMixture:
        """The mixture at one noise level, with its tables computed; reuse it for more rows at that level."""
        return NoisedMixture(self, u)

    def velocity(self, z: Tensor, u: Tensor | float) -> Tensor:
        """``E[noise - z | z_u]`` (N, D) at rows z_u (N, D), with u a number or one per row (N,)."""
        return map_levels(u, lambda level, rows: self.at(level).velocity(rows), z)

    def posterior_mean(self, z: Tensor, u: Tensor | float) -> Tensor:
        """``E[z | z_u]`` (N, D); arguments as for :meth:`velocity`."""
        return map_levels(u, lambda level, rows: self.at(level).posterior_mean(rows), z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density (N,) in nats of rows (N, D)."""
        return self.at(0.0).log_prob(z)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw ``n`` rows (n, D), determined by the seed."""
        generator, like = torch_rng(seed), self.means
        which = torch.multinomial(self.weights.float().cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, like.shape[1] + self.rank, generator=generator).to(like)
        which = which.to(like.device)
        own, shared = noise[:, : like.shape[1]], noise[:, like.shape[1] :]
        drawn = self.means[which] + own * self.variances[which].sqrt()
        if self.rank:
            for k in which.unique().tolist():  # gathering (n, R, D) would not fit if R and D are large
                at = which == k
                drawn[at] += shared[at] @ self.factors[k]
        return drawn if self.basis is None else drawn @ self.basis.T

    def floored(self, floor: float) -> GaussianMixture:
        """The same mixture with variances of at least ``floor``."""
        variances = self.variances.clamp_min(floor)
        return GaussianMixture(self.weights, self.means, variances, self.factors, self.basis)

    def rotated(self, z: Tensor) -> Tensor:
        """Coordinates (N, D) of rows in the basis."""
        return z if self.basis is None else z @ self.basis


class NoisedMixture:
    """A mixture at one noise level u: the distribution of ``z_u``, and the conditional means given it.

    Tables of shape (K, D) and (K, R, D) are computed once, when they are first needed.

    Args:
        mixture: mixture of the clean rows.
        u: noise level.
    """

    def __init__(self, mixture: GaussianMixture, u: float) -> None:
        self.mixture, self.u = mixture, u
        a, means = 1 - u, mixture.means
        self._precision_KD = 1 / (a * a * mixture.variances + u * u)
        self._scaled_KRD = self._scaled_factors()
        log_det_K = -self._precision_KD.log().sum(1) + self._log_det_K
        self._constant_K = mixture.weights.log() - 0.5 * (
            a * a * (means.square() * self._precision_KD).sum(1) + log_det_K + means.shape[1] * LOG_2PI
        )
        self._quadratic_KD = -0.5 * self._precision_KD
        self._linear_KD = a * means * self._precision_KD
        self._shift_KR = a * torch.einsum("krd,kd->kr", self._scaled_KRD, means)

    def _scaled_factors(self) -> Tensor:
        """Return ``G = L^-1 F diag(1/s)`` (K, R, D), and keep ``log det L L^T`` (K,) in ``_log_det_K``."""
        mixture, a = self.mixture, 1 - self.u
        if not mixture.rank:
            self._log_det_K = torch.zeros_like(mixture.weights)
            return mixture.factors
        scaled_KRD = mixture.factors * self._precision_KD[:, None]
        inner_KRR = a * a * scaled_KRD @ mixture.factors.mT
        inner_KRR.diagonal(dim1=1, dim2=2).add_(1)
        lower_KRR = torch.linalg.cholesky(inner_KRR)
        self._log_det_K = 2 * lower_KRR.diagonal(dim1=1, dim2=2).log().sum(1)
        # Solving for all D columns would take twenty times as long as multiplying by the small inverse.
        identity_RR = torch.eye(mixture.rank, dtype=lower_KRR.dtype, device=lower_KRR.device)
        inverse_KRR = torch.linalg.solve_triangular(lower_KRR, identity_RR.expand_as(lower_KRR), upper=False)
        return inverse_KRR @ scaled_KRD

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density (N,) in nats of rows z_u (N, D)."""
        return self._mapped(z, lambda rows: self._joint(rows)[0].logsumexp(1))

    def log_joint(self, z: Tensor) -> Tensor:
        """``log w_k + log N(z_u; a m_k, S_k)`` (N, K) of rows z_u (N, D): unnormalised log responsibilities."""
        return self._mapped(z, lambda rows: self._joint(rows)[0])

    def diagonal_part(self, rotated: Tensor) -> Tensor:
        """:meth:`log_joint` (N, K) without the factors' terms, at coordinates (N, D) in the basis."""
        joint = torch.addmm(self._constant_K, rotated.square(), self._quadratic_KD.T)
        return joint.addmm_(rotated, self._linear_KD.T)

    def diagonal_part_of(self, k: Tensor, rotated: Tensor) -> Tensor:
        """Columns k (N, C) of :meth:`diagonal_part`, chosen per row."""
        # z^2 q + z l as z (z q + l): one pass over the tables
        inner = torch.addcmul(self._linear_KD[k], rotated[:, None], self._quadratic_KD[k])
        return torch.linalg.vecdot(inner, rotated[:, None].expand_as(inner)) + self._constant_K[k]

    def factor_part_of(self, k: int, rotated: Tensor) -> Tensor:
        """The term (N,) that component k's factors add to :meth:`diagonal_part`, at coordinates (N, D) in the basis."""
        y_NR = rotated @ self._scaled_KRD[k].T - self._shift_KR[k]
        return 0.5 * (1 - self.u) ** 2 * y_NR.square().sum(1)

    def component(self, z: Tensor) -> Tensor:
        """The most likely component (N,) of rows z_u (N, D)."""
        return self._mapped(z, lambda rows: self._joint(rows)[0].max(1).indices)

    def velocity(self, z: Tensor) -> Tensor:
        """``E[noise - z | z_u]`` (N, D) at rows z_u (N, D): the components' velocities, weighted by responsibility."""
        factor_KD = gain(self.mixture.variances, self.u)
        return self._mixed(z, factor_KD, -1.0, -(1 - self.u) * self.u)

    def posterior_mean(self, z: Tensor) -> Tensor:
        """``E[z | z_u]`` (N, D) at rows z_u (N, D)."""
        factor_KD = shrink(self.mixture.variances, self.u)
        return self._mixed(z, factor_KD, 1.0, (1 - self.u) * self.u**2)

    def _mixed(self, z: Tensor, factor_KD: Tensor, sign: float, along: float) -> Tensor:
        """``sum_k r_k (sign * m_k + diag(factor_k) x_k + along * G_k^T G_k x_k)``."""
        offset_KD = sign * self.mixture.means - factor_KD * (1 - self.u) * self.mixture.means

        def at(rows: Tensor) -> Tensor:
            joint, y_NKR = self._joint(rows)
            share = joint.softmax(1)
            found = torch.addcmul(share @ offset_KD, rows, share @ factor_KD)
            return self._turned_back(found + along * self._back(share, y_NKR))

        return self._mapped(z, at)

    def velocity_and_divergence(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity (N, D) at rows z_u (N, D) and its exact divergence (N,).

        With v_k and g_k the velocity and the score of component k and r_k its responsibility,
        ``div v = sum_k r_k (tr factor_k + g_k v_k) - (sum_k r_k g_k) (sum_k r_k v_k)``. The divergence costs about
        as much as two more velocities.
        """
        parts = [self._velocity_and_divergence(rows) for rows in self._chunks(self.mixture.rotated(z))]
        return torch.cat([v for v, _ in parts]), torch.cat([divergence for _, divergence in parts])

    def _velocity_and_divergence(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        a, u, means, precision_KD = 1 - self.u, self.u, self.mixture.means, self._precision_KD
        gain_KD, bend_KD, trace_K, curved_K = self._divergence_tables
        joint, y_NKR = self._joint(rows)
        share = joint.softmax(1)
        back = self._back(share, y_NKR)
        velocity = torch.addcmul(share @ (-means - a * gain_KD * means), rows, share @ gain_KD) - a * u * back
        score = torch.addcmul(share @ (a * precision_KD * means), rows, share @ precision_KD, value=-1)
        score = score + a * a * back
        # g_k v_k = m^T S^-1 x - x^T S^-1 factor x: first its diagonal part, then the factors' terms
        inner = torch.addmm(curved_K, rows.square(), -bend_KD.T)
        inner.addmm_(rows, (precision_KD * means + 2 * a * bend_KD * means).T)
        if self.mixture.rank:
            inner += self._factor_part(rows, y_NKR)
        spread = (share * inner).sum(1) - (score * velocity).sum(1)
        # Far out, one component has all the responsibility, and this is a difference of two large, equal numbers.
        spread = torch.where(share.max(1).values >= CERTAIN, 0.0, spread)
        return self._turned_back(velocity), (share * trace_K).sum(1) + spread

    @functools.cached_property
    def _divergence_tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """gain (K, D), gain / s (K, D), the factor's trace (K,) and the constant of ``g_k v_k`` (K,)."""
        a, means, precision_KD = 1 - self.u, self.mixture.means, self._precision_KD
        gain_KD = gain(self.mixture.variances, self.u)
        bend_KD = gain_KD * precision_KD
        trace_K = gain_KD.sum(1) - a * self.u * self._scaled_KRD.square().sum((1, 2))
        curved_K = -(means.square() * (a * precision_KD + a * a * bend_KD)).sum(1)
        return gain_KD, bend_KD, trace_K, curved_K

    @functools.cached_property
    def _factor_tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``G diag(1/s)`` (K, R, D), its product with a m (K, R), ``G m`` (K, R) and ``G G^T`` (K, R, R)."""
        scaled_KRD, means = self._scaled_KRD, self.mixture.means
        twice_KRD = scaled_KRD * self._precision_KD[:, None]
        shift_KR = (1 - self.u) * torch.einsum("krd,kd->kr", twice_KRD, means)
        return twice_KRD, shift_KR, torch.einsum("krd,kd->kr", scaled_KRD, means), scaled_KRD @ scaled_KRD.mT

    def _factor_part(self, rows: Tensor, y_NKR: Tensor) -> Tensor:
        """The terms (N, K) that the factors add to ``m^T S^-1 x - x^T S^-1 factor x``.

        ``-a^2 (G m) y - a y^2 + 2 a u y h - a^3 u y^T (G G^T) y`` with ``h = G diag(1/s) x``. This follows from
        ``a diag(gain) = u diag(1/s) - I``.
        """
        a, u = 1 - self.u, self.u
        twice_KRD, shift_KR, along_KR, gram_KRR = self._factor_tables
        h_NKR = (rows @ twice_KRD.flatten(0, 1).T).unflatten(1, twice_KRD.shape[:2]) - shift_KR
        bent_NKR = torch.einsum("nkr,krs->nks", y_NKR, gram_KRR)
        return (y_NKR * (2 * a * u * h_NKR - a * a * along_KR - a * y_NKR - a**3 * u * bent_NKR)).sum(2)

    def _joint(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``log w_k + log N(z_u; a m_k, S_k)`` (N, K), and the projections y (N, K, R)."""
        joint = self.diagonal_part(rows)
        if not self.mixture.rank:
            return joint, rows.new_zeros(len(rows), self.mixture.components, 0)
        y_NKR = (rows @ self._scaled_KRD.flatten(0, 1).T).unflatten(1, self._scaled_KRD.shape[:2])
        y_NKR = y_NKR - self._shift_KR
        return joint + 0.5 * (1 - self.u) ** 2 * y_NKR.square().sum(2), y_NKR

    def _back(self, share: Tensor, y_NKR: Tensor) -> Tensor | float:
        """``sum_k r_k G_k^T y_k`` (N, D)."""
        if not self.mixture.rank:
            return 0.0
        return (share[:, :, None] * y_NKR).flatten(1) @ self._scaled_KRD.flatten(0, 1)

    def _turned_back(self, rows: Tensor) -> Tensor:
        return rows if self.mixture.basis is None else rows @ self.mixture.basis.T

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(MIXTURE_FLOATS // (self.mixture.components * (1 + self.mixture.rank)), 64))

    def _mapped(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([function(rows) for rows in self._chunks(self.mixture.rotated(z))])
