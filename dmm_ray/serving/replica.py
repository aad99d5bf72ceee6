"""The deployment that holds a prior: joins requests into row batches, computed beside its event loop."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ray import serve

from dmm_ray.serving.batching import Columns, RowBatcher, Rows
from dmm_ray.serving.calls import Call, PriorInfo

if TYPE_CHECKING:
    from dmm_ray.prior import ActivationPrior

logger = logging.getLogger(__name__)
NAMED_ANSWERS = {"denoise": "activations", "sample": "activations", "encode": "features"}


def solve(prior: ActivationPrior, call: Call, rows: Rows) -> Columns:
    """One call of the prior on joined rows; the answer's columns as the HTTP API names them."""
    arguments: dict[str, Any] = {**dict(call.arguments), "ids": rows["ids"]}
    subject = len(rows["ids"]) if call.operation == "sample" else rows["activations"]
    result = getattr(prior, call.operation)(subject, **arguments)
    if call.operation != "log_prob":
        return {NAMED_ANSWERS[call.operation]: result.cpu().numpy()}
    names = ("nats", "nats_per_dim", "stderr", "percentile", "latent_percentile")
    found = {name: getattr(result, name) for name in names}
    columns: Columns = {name: None if value is None else value.cpu().numpy() for name, value in found.items()}
    return {**columns, "evaluations": result.evaluations}


@serve.deployment
class PriorDeployment:
    """Answers calls of one prior.

    Args:
        source: the prior's folder or hub id.
        device: where it computes, ``cpu`` or ``cuda``.
        threads: CPU threads of the solver.
        max_batch_rows: rows of one solver call.
        batch_wait_s: how long to wait for rows to join the first.

    Raises:
        UserError: no prior at ``source``.
    """

    def __init__(
        self, source: str, device: str, threads: int, max_batch_rows: int, batch_wait_s: float
    ) -> None:
        # Imported here: the ingress imports this module to name the deployment, and does without torch.
        import torch

        from dmm_ray.prior import ActivationPrior
        from dmm_ray.prior.model import EXACT_TRACE_MAX_D

        torch.set_num_threads(threads)
        self._prior = ActivationPrior.from_pretrained(source, device=device)
        self._batcher = RowBatcher[Call](self._solve, max_batch_rows, batch_wait_s)
        c = self._prior.config
        self._info = PriorInfo(c.d, c.layers, c.n_blocks, c.d_mlp, exact_trace=c.d <= EXACT_TRACE_MAX_D)
        self._prior.log_prob(
            self._prior.sample(1, steps=1, layer=c.layers[0]), steps=1, layer=c.layers[0]
        )  # warm-up
        logger.info("serving %s on %s: d %d, layers %s", source, device, c.d, c.layers)

    async def describe(self) -> PriorInfo:
        """The prior's shape; an answer also says that this process is up."""
        return self._info

    async def compute(self, call: Call, rows: Rows) -> Columns:
        """The answer to a checked request, computed together with others that ask the same of other rows."""
        return await self._batcher.submit(call, rows)

    def _solve(self, call: Call, rows: Rows) -> Columns:
        start = time.perf_counter()
        columns = solve(self._prior, call, rows)
        logger.debug("%s: %d rows in %.3f s", call.operation, len(rows["ids"]), time.perf_counter() - start)
        return columns
