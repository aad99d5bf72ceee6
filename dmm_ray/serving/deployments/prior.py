"""The deployment of a prior: batches the rows of requests and computes them in a thread beside its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from dmm_ray.errors import CheckFailed
from dmm_ray.operations import OPERATIONS, LogProbArguments, OperationArguments
from dmm_ray.precision import PrecisionOption
from dmm_ray.serving.deployments.batching import Columns, RowBatcher, Rows
from dmm_ray.serving.deployments.calls import Call, PriorInfo
from dmm_ray.serving.deployments.pace import Pace
from dmm_ray.serving.metrics import SolverMetrics

if TYPE_CHECKING:
    from torch import Tensor

    from dmm_ray.prior import ActivationPrior

logger = logging.getLogger("ray.serve.dmm")
TIMED_S = 2.0
"""About how long a call of one row is timed at a start."""


def solve(prior: ActivationPrior, call: Call, rows: Rows) -> Columns:
    """One call of the prior on batched rows; the columns are named as in the HTTP API."""
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
    """Answers calls of one prior, which ``reconfigure`` loads and may replace while requests are served.

    Args:
        device: device of the computation, ``cpu`` or ``cuda``.
        precision: precision of the prior's products; ``auto`` depends on the device.
        threads: CPU threads of the solver.
        max_batch_rows: maximum rows per solver call.
        batch_wait_s: how long to wait for more rows after the first, in seconds.
        hung_s: a solver call that takes longer, in seconds, makes this replica unhealthy.
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
        # Imported here: the ingress imports this module to refer to the deployment, and does not need torch.
        import torch

        torch.set_num_threads(threads)
        self._device, self._precision = device, precision
        self._hung_s = hung_s
        self._prior: ActivationPrior | None = None
        self._metrics = SolverMetrics()
        self._max_batch_rows = max_batch_rows
        self._pace = Pace(max_batch_rows)
        self._batcher = RowBatcher[Call](self._solve, self._most_rows, batch_wait_s, self._metrics.waiting)

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Load the prior at ``user_config["source"]``, warm it up, and then replace the previous one.

        Raises:
            UserError: there is no such prior.
            CheckFailed: its answers contain NaN or Inf.
        """
        source = user_config["source"]
        apart = ThreadPoolExecutor(1)  # meanwhile the solver's thread keeps serving the previous prior
        try:
            loop = asyncio.get_running_loop()
            prior, fixed_s = await loop.run_in_executor(apart, _warm, source, self._device, self._precision)
        finally:
            apart.shutdown(wait=False)
        self._prior, self._pace = prior, Pace(self._max_batch_rows, fixed_s)
        c = prior.config
        logger.info(
            "serving %s on %s in %s: d %d, layers %s", source, self._device, prior.precision, c.d, c.layers
        )

    async def check_health(self) -> None:
        """Run the model on one row if it is idle; Serve replaces this replica if this raises."""
        if self._prior is None:
            return  # Serve's first health check comes before reconfigure
        if self._batcher.busy_s > self._hung_s:
            raise RuntimeError(f"a solver call has run for more than {self._hung_s:g} s")
        if not self._batcher.busy_s:
            await self._batcher.aside(partial(_one_sample, self._prior))

    async def describe(self) -> PriorInfo:
        """The prior's shape; also serves as a liveness check."""
        from dmm_ray.prior.likelihood import EXACT_TRACE_MAX_D

        assert self._prior
        c, precision = self._prior.config, self._prior.precision
        exact = c.d <= EXACT_TRACE_MAX_D
        return PriorInfo(c.d, c.layers, c.n_blocks, c.d_mlp, precision, exact_trace=exact)

    async def compute(self, call: Call, rows: Rows) -> Columns:
        """The answer to a checked request, batched with others that make the same call on other rows."""
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
        asked = self._asked(call)
        self._pace.took(n * asked.passes(self._prior.d), asked.evaluations(), seconds)
        self._metrics.solved(call.operation, n, seconds)
        return columns

    def _most_rows(self, call: Call) -> int:
        assert self._prior
        asked = self._asked(call)
        return self._pace.rows(asked.passes(self._prior.d), asked.evaluations())

    def _asked(self, call: Call) -> OperationArguments:
        kind = OPERATIONS[call.operation]
        return kind(**{name: value for name, value in call.arguments if name in kind.model_fields})


def _warm(source: str, device: str, precision: PrecisionOption) -> tuple[ActivationPrior, float]:
    """Load a prior and run each operation once; also returns the seconds per evaluation of a call with one row.

    Raises:
        UserError: there is no prior at ``source``.
        CheckFailed: its answers contain NaN or Inf.
    """
    from dmm_ray.prior import ActivationPrior

    prior = ActivationPrior.from_pretrained(source, device=device, precision=precision)
    layer, row = prior.layers[0], _one_sample(prior)
    prior.log_prob(row, steps=1, probes=1, layer=layer)
    prior.denoise(row, steps=1, layer=layer)
    prior.encode(row, layer=layer)

    def evaluation_s(steps: int) -> float:
        start = time.perf_counter()
        prior.log_prob(row, steps=steps, probes=1, layer=layer)
        return (time.perf_counter() - start) / LogProbArguments(steps=steps).evaluations()

    # As many noise levels as a request has, since not all may be remembered; fewer on a slow device.
    usual = LogProbArguments()
    affordable = int(TIMED_S / evaluation_s(1)) * usual.steps // usual.evaluations()
    return prior, evaluation_s(max(1, min(usual.steps, affordable)))


def _one_sample(prior: ActivationPrior) -> Tensor:
    """The smallest unit of work: one sample (1, d). Raises CheckFailed if it contains NaN or Inf."""
    row = prior.sample(1, steps=1, layer=prior.layers[0])
    if not row.isfinite().all():
        raise CheckFailed("the prior's answers contain NaN or Inf; its weights are damaged")
    return row
