"""The deployment that holds a prior: joins requests into row batches, computed beside its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from dmm_ray.errors import CheckFailed
from dmm_ray.operations import OPERATIONS, LogProbArguments
from dmm_ray.precision import PrecisionOption
from dmm_ray.serving.deployments.batching import Columns, RowBatcher, Rows
from dmm_ray.serving.deployments.calls import Call, PriorInfo
from dmm_ray.serving.deployments.pace import Pace
from dmm_ray.serving.metrics import SolverMetrics

if TYPE_CHECKING:
    from torch import Tensor

    from dmm_ray.prior import ActivationPrior

logger = logging.getLogger("ray.serve.dmm")


def solve(prior: ActivationPrior, call: Call, rows: Rows) -> Columns:
    """One call of the prior on joined rows; the answer's columns as the HTTP API names them."""
    import torch

    from dmm_ray.prior.ask import ask

    told: dict[str, Any] = dict(call.arguments)
    if "u" in rows:
        told["u"] = torch.from_numpy(rows["u"])
    ids = torch.from_numpy(rows["ids"])
    subject = len(ids) if call.operation == "sample" else torch.from_numpy(rows["activations"])
    found = ask(prior, call.operation, subject, ids, told)
    columns: Columns = {name: None if value is None else value.cpu().numpy() for name, value in found.items()}
    if call.operation == "log_prob":
        columns["evaluations"] = LogProbArguments(**{k: told[k] for k in ("steps", "method")}).evaluations()
    return columns


@serve.deployment
class PriorDeployment:
    """Answers calls of one prior, which ``reconfigure`` loads and may replace while requests continue.

    Args:
        device: where it computes, ``cpu`` or ``cuda``.
        precision: of the prior's products; ``auto`` goes by the device.
        threads: CPU threads of the solver.
        max_batch_rows: rows of one solver call.
        batch_wait_s: how long to wait for rows to join the first.
        hung_s: a solver call that takes longer makes this process unhealthy.
    """

    def __init__(
        self,
        device: str,
        precision: PrecisionOption,
        threads: int,
        max_batch_rows: int,
        batch_wait_s: float,
        hung_s: float,
    ) -> None:
        # Imported here: the ingress imports this module to name the deployment, and does without torch.
        import torch

        torch.set_num_threads(threads)
        self._device, self._precision = device, precision
        self._hung_s = hung_s
        self._prior: ActivationPrior | None = None
        self._metrics = SolverMetrics()
        self._pace = Pace(max_batch_rows)
        self._batcher = RowBatcher[Call](self._solve, self._most_rows, batch_wait_s, self._metrics.waiting)

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Load the prior at ``user_config["source"]`` and warm it up, then let it take the place of the one before.

        Raises:
            UserError: no prior there.
            CheckFailed: its answers are not finite.
        """
        source = user_config["source"]
        apart = ThreadPoolExecutor(1)  # the solver's thread continues with the previous prior
        try:
            loop = asyncio.get_running_loop()
            prior = await loop.run_in_executor(apart, _warm, source, self._device, self._precision)
        finally:
            apart.shutdown(wait=False)
        self._prior = prior
        c = prior.config
        logger.info(
            "serving %s on %s in %s: d %d, layers %s", source, self._device, prior.precision, c.d, c.layers
        )

    async def check_health(self) -> None:
        """Run the model on one row if it is idle; Serve replaces this process when this raises."""
        if self._prior is None:
            return  # Serve asks once before it configures
        if self._batcher.busy_s > self._hung_s:
            raise RuntimeError(f"a solver call has run for more than {self._hung_s:g} s")
        if not self._batcher.busy_s:
            await self._batcher.aside(partial(_one_sample, self._prior))

    async def describe(self) -> PriorInfo:
        """The prior's shape; an answer also says that this process is up."""
        from dmm_ray.prior.likelihood import EXACT_TRACE_MAX_D

        assert self._prior
        c, precision = self._prior.config, self._prior.precision
        exact = c.d <= EXACT_TRACE_MAX_D
        return PriorInfo(c.d, c.layers, c.n_blocks, c.d_mlp, precision, exact_trace=exact)

    async def compute(self, call: Call, rows: Rows) -> Columns:
        """The answer to a checked request, computed together with others that ask the same of other rows."""
        return await self._batcher.submit(call, rows)

    def _solve(self, call: Call, rows: Rows) -> Columns:
        assert self._prior
        start = time.perf_counter()
        try:
            columns = solve(self._prior, call, rows)
        except Exception:
            self._metrics.failed(call.operation)
            raise
        n, seconds = len(rows["ids"]), time.perf_counter() - start
        self._pace.took(n * self._passes(call), seconds)
        self._metrics.solved(call.operation, n, seconds)
        return columns

    def _most_rows(self, call: Call) -> int:
        return self._pace.rows(self._passes(call))

    def _passes(self, call: Call) -> int:
        """Forward passes that a row costs."""
        assert self._prior
        kind = OPERATIONS[call.operation]
        told = {name: value for name, value in call.arguments if name in kind.model_fields}
        return kind(**told).passes(self._prior.d)


def _warm(source: str, device: str, precision: PrecisionOption) -> ActivationPrior:
    """A loaded prior that has done each operation once.

    Raises:
        UserError: no prior at ``source``.
        CheckFailed: its answers are not finite.
    """
    from dmm_ray.prior import ActivationPrior

    prior = ActivationPrior.from_pretrained(source, device=device, precision=precision)
    layer, row = prior.layers[0], _one_sample(prior)
    prior.log_prob(row, steps=1, probes=1, layer=layer)
    prior.denoise(row, steps=1, layer=layer)
    prior.encode(row, layer=layer)
    return prior


def _one_sample(prior: ActivationPrior) -> Tensor:
    """The smallest piece of work, (1, d). Raises CheckFailed if the result is NaN or Inf."""
    row = prior.sample(1, steps=1, layer=prior.layers[0])
    if not row.isfinite().all():
        raise CheckFailed("the prior's answers are not finite; its weights are damaged")
    return row
