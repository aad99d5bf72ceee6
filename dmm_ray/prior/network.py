"""The denoiser: a residual gated MLP whose gates are scaled by the noise level.

The architecture of the published Generative Latent Prior (Luo et al. 2026), with its tensor names::

    h = in_proj(z_u);  e = time_embed(sinusoid(1000 u))
    with several layers:  e += layer_embed(sinusoid(layer / (n_layers - 1)))
    per block:  y = ln(h);  h += down_proj(silu(gate_proj(y) * time_proj(e)) * up_proj(y))
    velocity = out_proj(ln(h))

Shapes: B rows, M distinct conditions (noise level, layer), D activation width, H model width, F MLP width; S = 1 + K
stacked passes: the plain one and its derivatives along K tangents (forward mode by hand: unlike torch.func.jvp under
vmap, it needs no global state, so it is safe to run in threads, and it compiles).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmm_ray.prior.flow import NOISE_LEVELS


def sinusoid(t_M: Tensor, width: int) -> Tensor:
    """``[cos(t f_i), sin(t f_i)]`` with ``f_i = exp(-ln(10000) i / (width / 2))``, (M, width), in float32."""
    half = width // 2
    frequency = torch.exp(
        -math.log(10000.0) / half * torch.arange(half, device=t_M.device, dtype=torch.float32)
    )
    angle = t_M.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """One residual block; its gate is computed outside, once per distinct noise level."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)
        self.time_proj = nn.Linear(d_model, d_mlp)

    def hidden(self, h_BH: Tensor, gate_MF: Tensor) -> Tensor:
        """The block's hidden units (B, F), the inputs of ``down_proj``: the prior's meta-neurons.

        Rows come in M runs of equal length, one per gate.
        """
        y_BH = self.ln(h_BH)
        gated_MkF = self.gate_proj(y_BH).unflatten(0, (len(gate_MF), -1)) * gate_MF[:, None]
        return F.silu(gated_MkF.flatten(0, 1)) * self.up_proj(y_BH)

    def forward(self, h_BH: Tensor, gate_MF: Tensor) -> Tensor:
        """The next residual state (B, H)."""
        return h_BH + self.down_proj(self.hidden(h_BH, gate_MF))

    def tangents(self, h_SBH: Tensor, gate_1F: Tensor) -> Tensor:
        """The next residual state and its tangents (S, B, H), all rows at one condition."""
        y_SBH = _norm_tangents(self.ln, h_SBH)
        a_SBF = _linear_tangents(self.gate_proj, y_SBH) * gate_1F
        up_SBF = _linear_tangents(self.up_proj, y_SBH)
        gate, sigmoid = F.silu(a_SBF[0]), torch.sigmoid(a_SBF[0])
        slope = sigmoid * (1 + a_SBF[0] * (1 - sigmoid))
        hidden_KBF = slope * a_SBF[1:] * up_SBF[0] + gate * up_SBF[1:]
        hidden_SBF = torch.cat([(gate * up_SBF[0])[None], hidden_KBF])
        return h_SBH + _linear_tangents(self.down_proj, hidden_SBF)


class Denoiser(nn.Module):
    """Predicts the velocity ``noise - z`` of normalised activations.

    Args:
        d: activation width D.
        d_model: residual width H, even.
        d_mlp: hidden width F of a block.
        n_blocks: number of blocks.
        multi_layer: condition on the layer too.
    """

    def __init__(self, d: int, d_model: int, d_mlp: int, n_blocks: int, multi_layer: bool = False) -> None:
        super().__init__()
        self.d_model = d_model
        self.in_proj = nn.Linear(d, d_model)
        self.time_embed = _embedding(d_model)
        self.layer_embed = _embedding(d_model) if multi_layer else None
        self.layers = nn.ModuleList(Block(d_model, d_mlp) for _ in range(n_blocks))
        self.ln = nn.LayerNorm(d_model)
        self.out_proj = nn.Linear(d_model, d)

    @property
    def blocks(self) -> Iterable[Block]:
        """``layers``, typed as blocks."""
        return cast(Iterable[Block], self.layers)

    def gates(self, u_M: Tensor, depth_M: Tensor | None = None) -> list[Tensor]:
        """The time path: every block's gate (M, F) for M distinct conditions.

        Args:
            u_M: noise levels in [0, 1].
            depth_M: layer / (n_layers - 1) of the subject; multi-layer priors only.
        """
        dtype = self.in_proj.weight.dtype
        e_MH = self.time_embed(sinusoid(u_M * NOISE_LEVELS, self.d_model).to(dtype))
        if self.layer_embed is not None:
            assert depth_M is not None
            e_MH = e_MH + self.layer_embed(sinusoid(depth_M, self.d_model).to(dtype))
        return [block.time_proj(e_MH) for block in self.blocks]

    def velocity(self, z_BD: Tensor, gates: list[Tensor], index_B: Tensor | None = None) -> Tensor:
        """The velocity (B, D) of rows in M equal runs, one per condition, or with the condition's ``index`` per row."""
        h_BH = self.in_proj(z_BD)
        for block, gate in zip(self.blocks, gates, strict=True):
            h_BH = block(h_BH, gate if index_B is None else gate[index_B])
        return self.out_proj(self.ln(h_BH))

    def tangents(self, z_BD: Tensor, gates: list[Tensor], t_KBD: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity (B, D) of rows at one condition, and its derivatives along tangents t (K, B, D)."""
        h_SBH = _linear_tangents(self.in_proj, torch.cat([z_BD[None], t_KBD]))
        for block, gate in zip(self.blocks, gates, strict=True):
            h_SBH = block.tangents(h_SBH, gate)
        v_SBD = _linear_tangents(self.out_proj, _norm_tangents(self.ln, h_SBH))
        return v_SBD[0], v_SBD[1:]

    def meta_neurons(self, z_BD: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """Every block's hidden units (B, F)."""
        h_BH, found = self.in_proj(z_BD), []
        for block, gate in zip(self.blocks, gates, strict=True):
            hidden_BF = block.hidden(h_BH, gate)
            found.append(hidden_BF)
            h_BH = h_BH + block.down_proj(hidden_BF)
        return found

    def forward(
        self, z_BD: Tensor, u_M: Tensor, index_B: Tensor | None = None, depth_M: Tensor | None = None
    ) -> Tensor:
        """:meth:`gates` then :meth:`velocity`."""
        return self.velocity(z_BD, self.gates(u_M, depth_M), index_B)


def _embedding(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


def _linear_tangents(linear: nn.Linear, x_SBI: Tensor) -> Tensor:
    y_SBO = F.linear(x_SBI, linear.weight)
    y_SBO[0] += linear.bias
    return y_SBO


def _norm_tangents(norm: nn.LayerNorm, h_SBH: Tensor) -> Tensor:
    """LayerNorm ``n = (h - mean) r``; its derivative is ``r (c - n mean(n c))`` with c the centred tangent."""
    wide_SBH = h_SBH.to(torch.promote_types(h_SBH.dtype, torch.float32))
    centred = wide_SBH - wide_SBH.mean(-1, keepdim=True)
    r = (centred[0].square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    n = centred[0] * r
    along = r * (centred[1:] - n * (n * centred[1:]).mean(-1, keepdim=True))
    return torch.cat([(n * norm.weight + norm.bias)[None], along * norm.weight]).to(h_SBH.dtype)
