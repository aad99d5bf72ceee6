"""The client: a prior's operations, and those on texts, through an endpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote

import httpx
import numpy as np

from dmm_ray.client.errors import ClientError, UnavailableError
from dmm_ray.client.events import events
from dmm_ray.client.results import GeneratedText, LogProbArrays, Models, TextScore, Token, TopUnitArrays
from dmm_ray.client.rows import RequestRows, array_of, plain
from dmm_ray.client.transport import Transport
from dmm_ray.operations import OPERATIONS, Grid, Method, Mode
from dmm_ray.precision import PrecisionOption
from dmm_ray.protocol import LENGTH_HEADER, pack, unpack

Columns = dict[str, np.ndarray]
Result = TypeVar("Result")


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; the endpoint sets the defaults."""

    strength: float
    """How far along the direction, in mean activation norms."""
    u: float
    """Noise level of the projection, 0 (data) to 1 (noise)."""
    project: bool
    """Whether to bring the activation back to where natural ones lie."""
    steps: int
    max_tokens: int
    temperature: float
    """0: the likeliest token."""
    seed: int
    layer: int | None
    """Block to steer; None: the direction's own."""


class Client:
    """A thread-safe client of one endpoint. Close it, or use it as a context manager.

    Arguments and results are those of ``ActivationPrior``, with arrays instead of tensors. Rows are sent in chunks,
    several at a time. Each row keeps its id (0 .. n-1 unless given), so chunking changes no answer. A chunk that the
    endpoint rejects as too large is halved. A request that is temporarily refused (429, 503), or whose connection is
    lost, is retried.

    Args:
        url: the endpoint's address.
        token: a bearer token, if required.
        model: name of the prior; None for the endpoint's default.
        timeout: maximum wait for the answer to a chunk, in seconds.
        retries: maximum number of retries per chunk.
        deadline: no chunk is retried after this many seconds.
        chunk_rows: rows per chunk.
        in_flight: maximum number of concurrent chunks, over all calls.

    Raises of every method:
        ClientError: the endpoint refuses the request; the message names the field.
        UnavailableError: no answer within ``timeout``, or only refusals until ``deadline``.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        retries: int = 100,
        deadline: float = 300.0,
        chunk_rows: int = 1024,
        in_flight: int = 4,
    ) -> None:
        for name, value in (("chunk_rows", chunk_rows), ("in_flight", in_flight)):
            if value < 1:
                raise ClientError(f"{name}: must be at least 1 (got {value})")
        self._transport = Transport(url.rstrip("/"), token, timeout, retries, deadline)
        self._model = model
        self._chunk_rows = chunk_rows
        self._pool = ThreadPoolExecutor(in_flight, "dmm-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls in progress fail."""
        self._transport.close()
        self._pool.shutdown(cancel_futures=True)

    def ready(self) -> bool:
        """Whether the endpoint is reachable and all of its parts are ready; no retries.

        Example:
            >>> client.ready()
            True
        """
        return self._transport.is_ready()

    def models(self) -> Models:
        """The endpoint's priors and language model.

        Example:
            >>> client.models().priors[0].name
            'default'
        """
        return self._read("/v1/models", self._transport.get("/v1/models"), Models.read)

    def log_prob(
        self,
        x: Any,
        layer: int | None = None,
        steps: int = 32,
        probes: int = 2,
        ids: Any = None,
        seed: int = 0,
        method: Method = "midpoint",
        grid: Grid = "cosine",
        precision: PrecisionOption | None = None,
    ) -> LogProbArrays:
        """Log-likelihood of raw activations x (n, d) in nats; ``probes=0``: exact trace.

        Example:
            >>> client.log_prob(x, steps=4).nats.shape == (len(x),)
            True
        """
        found = self._ask(
            "log_prob", RequestRows.given(x, ids), layer=layer, steps=steps, probes=probes, seed=seed, method=method,
            grid=grid, precision=precision,
        )  # fmt: skip
        columns = {name: found.get(name) for name in OPERATIONS["log_prob"].RESULTS}
        return LogProbArrays(**columns, evaluations=int(found["evaluations"][0]))  # type: ignore[arg-type]

    def velocity_error(
        self,
        x: Any,
        layer: int | None = None,
        pairs: int = 8,
        ids: Any = None,
        seed: int = 0,
        precision: PrecisionOption | None = None,
    ) -> np.ndarray:
        """A cheap proxy for ``-log_prob`` (n,): mean squared error of the velocity; lower is more natural.

        Example:
            >>> client.velocity_error(x).shape == (len(x),)
            True
        """
        rows = RequestRows.given(x, ids)
        found = self._ask("velocity_error", rows, layer=layer, pairs=pairs, seed=seed, precision=precision)
        return found["velocity_error"]

    def denoise(
        self,
        x: Any,
        u: Any = 0.5,
        steps: int = 10,
        mode: Mode = "sample",
        layer: int | None = None,
        ids: Any = None,
        seed: int = 0,
        method: Method = "midpoint",
        grid: Grid = "cosine",
        precision: PrecisionOption | None = None,
        distance: float | None = None,
    ) -> np.ndarray:
        """Raw activations (n, d) moved to where natural ones lie: noised to level u (one, or one per row) and restored.

        With ``distance``, each row's u is the largest level that moves it by at most that much.

        Example:
            >>> client.denoise(x, u=0.3, steps=4).shape == x.shape
            True
        """
        several = array_of("u", u).ndim > 0
        rows = RequestRows.given(x, ids, u if several else None)
        return self._ask(
            "denoise", rows, u=None if several else u, steps=steps, mode=mode, layer=layer, seed=seed,
            method=method, grid=grid, precision=precision, distance=distance,
        )["activations"]  # fmt: skip

    def sample(
        self,
        n: int,
        steps: int = 20,
        layer: int | None = None,
        ids: Any = None,
        seed: int = 0,
        method: Method = "midpoint",
        grid: Grid = "cosine",
        precision: PrecisionOption | None = None,
    ) -> np.ndarray:
        """n raw activations (n, d) drawn from the prior.

        Example:
            >>> client.sample(5, steps=4).shape
            (5, 32)
        """
        return self._ask(
            "sample", RequestRows.drawn(n, ids), steps=steps, layer=layer, seed=seed, method=method, grid=grid,
            precision=precision,
        )["activations"]  # fmt: skip

    @overload
    def encode(
        self, x: Any, u: float = ..., block: int | None = ..., layer: int | None = ..., ids: Any = ...,
        seed: int = ..., noises: int = ..., precision: PrecisionOption | None = ..., top: None = ...,
    ) -> np.ndarray: ...  # fmt: skip

    @overload
    def encode(
        self, x: Any, u: float = ..., block: int | None = ..., layer: int | None = ..., ids: Any = ...,
        seed: int = ..., noises: int = ..., precision: PrecisionOption | None = ..., *, top: int,
    ) -> TopUnitArrays: ...  # fmt: skip

    def encode(
        self,
        x: Any,
        u: float = 0.1,
        block: int | None = None,
        layer: int | None = None,
        ids: Any = None,
        seed: int = 0,
        noises: int = 1,
        precision: PrecisionOption | None = None,
        top: int | None = None,
    ) -> np.ndarray | TopUnitArrays:
        """Meta-neurons (n, features) of raw activations at level u; ``block=None`` for those of all blocks.

        With ``top``, only the indices and values of the units with the largest values.

        Example:
            >>> client.encode(x).shape == (len(x), 64)
            True
        """
        found = self._ask(
            "encode", RequestRows.given(x, ids), u=u, block=block, layer=layer, seed=seed, noises=noises,
            precision=precision, top=top,
        )  # fmt: skip
        return found["features"] if top is None else TopUnitArrays(found["indices"], found["values"])

    def score_text(
        self, text: str, layer: int | None = None, steps: int = 32, probes: int = 2, seed: int = 0
    ) -> TextScore:
        """Log-probability of the language model's activation at each token of a text.

        Example:
            >>> found = client.score_text("the cat sat", steps=4)
            >>> len(found.tokens) == len(found.nats)
            True
        """
        body = {"text": text, "layer": layer, "steps": steps, "probes": probes, "seed": seed}
        answer = self._transport.post("/v1/score_text", *self._json(body))
        return self._read("/v1/score_text", answer, TextScore.read)

    def generate(
        self,
        prompt: str,
        direction: str | Sequence[float] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GeneratedText:
        """Text generated by the language model while steered along a direction, given by name or as d numbers.

        Example:
            >>> found = client.generate("the cat", "up", strength=0.5, max_tokens=4, steps=2)
            >>> len(found.tokens) <= 4
            True
        """
        body = {"prompt": prompt, "direction": direction, **options}
        answer = self._transport.post("/v1/generate", *self._json(body))
        return self._read("/v1/generate", answer, GeneratedText.read)

    def generate_stream(
        self,
        prompt: str,
        direction: str | Sequence[float] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Token | GeneratedText]:
        """``generate`` token by token; the last item is the full answer. Closing the iterator ends the generation.

        Example:
            >>> *tokens, last = client.generate_stream("the cat", max_tokens=4)
            >>> len(tokens) <= 4
            True
        """
        body = {"prompt": prompt, "direction": direction, "stream": True, **options}
        with self._transport.stream("/v1/generate", *self._json(body)) as chunks:
            for kind, data in events(chunks):
                if kind not in ("token", "done", "error"):
                    continue
                with answer_of("/v1/generate", data):
                    value = json.loads(data)
                    item = _event(kind, value)
                if isinstance(item, str):
                    raise UnavailableError(item)
                yield item
                if isinstance(item, GeneratedText):
                    return
        raise UnavailableError("/v1/generate: the stream ended before the text did; try again")

    @staticmethod
    def _read(route: str, answer: httpx.Response, read: Callable[[dict[str, Any]], Result]) -> Result:
        with answer_of(route, answer.text):
            return read(answer.json())

    def _json(self, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        given = {name: plain(name, value) for name, value in body.items()}
        content = json.dumps({**given, "model": self._model}).encode()
        return content, {"Content-Type": "application/json"}

    def _ask(self, operation: str, rows: RequestRows, **arguments: Any) -> Columns:
        name = operation if self._model is None else f"{self._model}.{operation}"
        route = f"/v2/models/{quote(name, safe='')}/infer"

        def ask(part: RequestRows) -> Columns:
            try:
                return self._infer(route, part, arguments)
            except ClientError as e:
                if e.status == 413 and len(part) > 1:
                    return _joined([ask(half) for half in part.cut(-(-len(part) // 2))])
                if len(part) == len(rows):
                    raise
                where = f"rows {part.start} to {part.start + len(part) - 1}"
                raise ClientError(f"{where}: {e}", e.status) from e

        self._transport.check_open()
        return _joined(list(self._pool.map(ask, rows.cut(self._chunk_rows))))

    def _infer(self, route: str, part: RequestRows, arguments: dict[str, Any]) -> Columns:
        given = {name: plain(name, value) for name, value in arguments.items()}
        body, head = pack(part.tensors(), given)
        headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(head)}
        answer = self._transport.post(route, body, headers)
        with answer_of(route, answer.text if "json" in answer.headers.get("content-type", "") else ""):
            return _columns(answer.content, int(answer.headers[LENGTH_HEADER]), len(part))


@contextlib.contextmanager
def answer_of(route: str, text: str) -> Iterator[None]:
    """Context for parsing an answer. Raises UnavailableError if it is not one of a dmm-ray endpoint."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        shown = " ".join(text.split())[:100]
        raise UnavailableError(
            f"{route}: the answer is not a dmm-ray endpoint's; check for a proxy in between. It begins {shown!r}"
        ) from e


def _event(kind: str, value: dict[str, Any]) -> Token | GeneratedText | str:
    """A token, the full text, or an error message. Raises KeyError or TypeError for anything else."""
    if kind == "error":
        return str(value["error"])
    return GeneratedText.read(value) if kind == "done" else Token(value["id"], value["text"])


def _columns(body: bytes, head_bytes: int, n: int) -> Columns:
    """The outputs of an answer. Raises ValueError, KeyError or TypeError if it is not an answer for n rows."""
    found = unpack(body, head_bytes)
    if not found or any(len(array) != n for name, array in found.items() if name != "evaluations"):
        raise ValueError(f"not an answer for {n} rows")
    return found


def _joined(parts: list[Columns]) -> Columns:
    """The columns of all parts, concatenated."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
