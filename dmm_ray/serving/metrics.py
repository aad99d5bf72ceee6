"""The endpoint's metrics, exported through Ray; exported names begin with ``ray_dmm_``."""

from __future__ import annotations

from typing import NamedTuple

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
ROW_BUCKETS = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0]


class Answered(NamedTuple):
    """What is recorded of a request; none of its content."""

    method: str
    route: str
    status: int
    rows: int
    seconds: float
    request_id: str


class HttpMetrics:
    """Metrics of HTTP requests."""

    def __init__(self) -> None:
        self._requests = Counter("dmm_requests", "HTTP requests answered.", ("route", "status"))
        self._errors = Counter(
            "dmm_request_errors", "HTTP requests that failed in the endpoint (5xx).", ("route",)
        )
        self._rows = Counter("dmm_request_rows", "Rows (or tokens) of answered requests.", ("route",))
        self._seconds = Histogram(
            "dmm_request_seconds", "Time to the end of the answer, in seconds.", SECONDS, ("route",)
        )

    def record(self, answered: Answered) -> None:
        """Record one request; status is 0 if the client disconnected."""
        route = {"route": answered.route}
        self._requests.inc(1, {**route, "status": str(answered.status)})
        self._seconds.observe(answered.seconds, route)
        if answered.status >= 500:
            self._errors.inc(1, route)
        if answered.rows and answered.status == 200:
            self._rows.inc(answered.rows, route)


class SolverMetrics:
    """Solver metrics of one replica of a prior."""

    def __init__(self) -> None:
        self._rows = Counter("dmm_solved_rows", "Rows computed.", ("operation",))
        self._failures = Counter("dmm_solver_failures", "Solver calls that raised.", ("operation",))
        self._batch = Histogram("dmm_batch_rows", "Rows per solver call.", ROW_BUCKETS, ("operation",))
        self._seconds = Histogram(
            "dmm_solver_seconds", "Time per solver call, in seconds.", SECONDS, ("operation",)
        )
        self._waiting = Gauge("dmm_waiting_rows", "Rows waiting for the solver.")

    def waiting(self, rows: int) -> None:
        """Set the number of waiting rows."""
        self._waiting.set(rows)

    def solved(self, operation: str, rows: int, seconds: float) -> None:
        """Record one solver call."""
        labels = {"operation": operation}
        self._rows.inc(rows, labels)
        self._batch.observe(rows, labels)
        self._seconds.observe(seconds, labels)

    def failed(self, operation: str) -> None:
        """Record one solver call that raised."""
        self._failures.inc(1, {"operation": operation})
