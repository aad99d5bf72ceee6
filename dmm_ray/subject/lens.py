"""The logit lens: activations read as tokens through the model's own final norm and unembedding."""

from __future__ import annotations

import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.subject.intervention import Intervention, Interventions, Site, Tokens
from dmm_ray.subject.runner import ModelRunner


@torch.no_grad()
def logit_lens(runner: ModelRunner, rows: Tensor) -> Tensor:
    """Logits (n, v), float32 on the CPU, of activations (n, d) substituted for the last block's output.

    Raises:
        UserError: wrong width; a row that contains NaN or Inf, or is too large for finite logits.
    """
    first = next(runner.model.parameters())
    given = rows.to(runner.device, first.dtype)  # large values may overflow in the model's dtype
    # A norm silently turns a row whose squares overflow float32 into zeros, without a NaN.
    fits = given.isfinite().all(1) & given.float().square().sum(1).isfinite()
    if bool(fits.all()):
        put = Intervention(Site(len(runner.blocks) - 1), lambda _x, _ids: given.float(), first=True)
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=runner.device)
        output = runner.forward(ids, Tokens.of(torch.ones_like(ids)), (), Interventions([put])).output
        logits = output.logits[:, -1].float()
        fits = logits.amax(1).isfinite()
        if bool(fits.all()):
            return logits.cpu()
    raise UserError(
        f"activations: row {int(fits.logical_not().nonzero()[0])} is too large for the model's final norm, or contains "
        "NaN or Inf; scale it down or fix it"
    )
