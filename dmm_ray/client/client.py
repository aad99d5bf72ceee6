"""The client: the operations of a prior, and those on texts, asked of an endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self, TypedDict, Unpack
from urllib.parse import quote

import numpy as np

from dmm_ray.client.errors import ClientError, UnavailableError
from dmm_ray.client.events import events
from dmm_ray.client.results import Generated, LogProb, Models, TextScore, Token
from dmm_ray.client.rows import Rows
from dmm_ray.client.tensors import LENGTH_HEADER, pack, unpack
from dmm_ray.client.transport import Transport

Columns = dict[str, np.ndarray]


class GenerateOptions(TypedDict, total=False):
    """What a generation may be told; the endpoint has the defaults."""

    strength: float
    """How far along the direction, in mean activation norms."""
    u: float
    """Noise level of the projection, 0 data to 1 noise."""
    project: bool
    """Whether to bring the activation back to where natural ones lie."""
    steps: int
    max_tokens: int
    temperature: float
    """0: the likeliest token."""
    seed: int
    layer: int | None
    """Block to steer; None: the direction's own."""


PERHAPS = ("stderr", "percentile", "latent_percentile", "combined_percentile")
"""Outputs of log_prob that an answer may lack."""


class Client:
    """One endpoint, from any thread. Close it, or use it as a context.

    Arguments and results are those of ``ActivationPrior`` with arrays for tensors. Rows are sent in parts, several at
    a time, each row under its id (0 .. n-1 unless given), so that parts change no answer; a part that the endpoint
    finds too large is halved. A request that is refused for now (429, 503), or whose connection is lost, is sent again.

    Args:
        url: the endpoint's address.
        token: a bearer token, if it wants one.
        model: name of the prior to ask; None: the endpoint's default.
        timeout: longest wait for the answer to a part, seconds.
        retries: how often a part is sent again.
        deadline: no part is sent again after this many seconds.
        chunk_rows: rows of a part.
        in_flight: parts that are on their way at a time, of all calls together.

    Raises of every method:
        ClientError: the endpoint refuses the request; the message names the field.
        UnavailableError: no answer in ``timeout``, or none but refusals until ``deadline``.
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
                raise ClientError(f"{name}: at least 1 is needed (got {value})")
        self._transport = Transport(url.rstrip("/"), token, timeout, retries, deadline)
        self._model = model
        self._chunk_rows = chunk_rows
        self._pool = ThreadPoolExecutor(in_flight, "dmm-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; calls under way fail."""
        self._transport.close()
        self._pool.shutdown(cancel_futures=True)

    def ready(self) -> bool:
        """Whether the endpoint can be reached and everything in it answers; one try."""
        return self._transport.is_ready()

    def models(self) -> Models:
        """The endpoint's priors and language model."""
        return Models.read(self._transport.get("/v1/models").json())

    def log_prob(
        self,
        x: Any,
        layer: int | None = None,
        steps: int = 32,
        probes: int = 2,
        ids: Any = None,
        seed: int = 0,
    ) -> LogProb:
        """Log-likelihood of raw activations x (n, d) in nats; ``probes=0``: exact trace."""
        found = self._ask("log_prob", Rows.given(x, ids), layer=layer, steps=steps, probes=probes, seed=seed)
        some = {name: found.get(name) for name in PERHAPS}
        return LogProb(found["nats"], found["nats_per_dim"], **some, evaluations=int(found["evaluations"][0]))

    def denoise(
        self,
        x: Any,
        u: float = 0.5,
        steps: int = 10,
        mode: Literal["sample", "mean"] = "sample",
        layer: int | None = None,
        ids: Any = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Raw activations (n, d) moved to where natural ones lie: noised to level u, restored."""
        rows = Rows.given(x, ids)
        return self._ask("denoise", rows, u=u, steps=steps, mode=mode, layer=layer, seed=seed)["activations"]

    def sample(
        self, n: int, steps: int = 20, layer: int | None = None, ids: Any = None, seed: int = 0
    ) -> np.ndarray:
        """n raw activations (n, d), drawn."""
        return self._ask("sample", Rows.drawn(n, ids), steps=steps, layer=layer, seed=seed)["activations"]

    def encode(
        self,
        x: Any,
        u: float = 0.1,
        block: int | None = None,
        layer: int | None = None,
        ids: Any = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Meta-neurons (n, features) of raw activations at level u; ``block=None``: those of all blocks."""
        return self._ask("encode", Rows.given(x, ids), u=u, block=block, layer=layer, seed=seed)["features"]

    def score_text(
        self, text: str, layer: int | None = None, steps: int = 32, probes: int = 2, seed: int = 0
    ) -> TextScore:
        """Log-probability of the language model's activation at each token of a text."""
        body = {"text": text, "layer": layer, "steps": steps, "probes": probes, "seed": seed}
        return TextScore.read(self._transport.post("/v1/score_text", *self._json(body)).json())

    def generate(
        self,
        prompt: str,
        direction: str | Sequence[float] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generated:
        """A text written by the language model while steered along a direction, its name or (d,) numbers."""
        body = {"prompt": prompt, "direction": _plain(direction), **options}
        return Generated.read(self._transport.post("/v1/generate", *self._json(body)).json())

    def generate_stream(
        self,
        prompt: str,
        direction: str | Sequence[float] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Token | Generated]:
        """``generate`` token by token; the last item is the whole answer. Closing the iterator ends the generation."""
        body = {"prompt": prompt, "direction": _plain(direction), "stream": True, **options}
        with self._transport.stream("/v1/generate", *self._json(body)) as chunks:
            for kind, value in events(chunks):
                if kind == "error":
                    raise UnavailableError(value["error"])
                yield Generated.read(value) if kind == "done" else Token(value["id"], value["text"])

    def _json(self, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        content = json.dumps({**_plain_numbers(body), "model": self._model}).encode()
        return content, {"Content-Type": "application/json"}

    def _ask(self, operation: str, rows: Rows, **arguments: Any) -> Columns:
        name = operation if self._model is None else f"{self._model}.{operation}"
        route = f"/v2/models/{quote(name, safe='')}/infer"

        def ask(part: Rows) -> Columns:
            try:
                return self._infer(route, part, arguments)
            except ClientError as e:
                if e.status == 413 and len(part) > 1:
                    return _joined([ask(half) for half in part.cut(-(-len(part) // 2))])
                if len(part) == len(rows):
                    raise
                where = f"rows {part.start} to {part.start + len(part) - 1}"
                raise ClientError(f"{where}: {e}", e.status) from e

        return _joined(list(self._pool.map(ask, rows.cut(self._chunk_rows))))

    def _infer(self, route: str, part: Rows, arguments: dict[str, Any]) -> Columns:
        content, length = pack(part.tensors(), _plain_numbers(arguments))
        headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(length)}
        answer = self._transport.post(route, content, headers)
        try:
            return unpack(answer.content, int(answer.headers[LENGTH_HEADER]))
        except (ValueError, KeyError, TypeError) as e:
            raise UnavailableError(f"{route}: the answer is not of the Open Inference Protocol") from e


def _joined(parts: list[Columns]) -> Columns:
    """Columns of parts one behind the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _plain_numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with numbers of numpy and torch as Python's, which JSON can hold."""
    return {name: v.item() if getattr(v, "shape", None) == () else v for name, v in arguments.items()}


def _plain(direction: str | Sequence[float] | None) -> str | list[float] | None:
    return direction if direction is None or isinstance(direction, str) else [float(v) for v in direction]
