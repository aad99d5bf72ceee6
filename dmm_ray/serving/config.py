"""Configuration of the endpoint: what it serves, how it is deployed, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dmm_ray.config import Config
from dmm_ray.precision import PrecisionOption

MOST_ROWS = 1 << 16
"""No configuration allows more rows, or numbers in a row, than this."""
DEFAULT_NAME = "default"
NAMED_PRIOR = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)")


def _listed(value: object) -> object:
    """``serve run`` passes every argument as one string."""
    return (value,) if isinstance(value, str) else value


def _absolute(uri: str) -> str:
    return str(Path(uri).absolute()) if Path(uri).is_dir() else uri


class Limits(Config):
    """What one request may ask for; more is refused with 413."""

    max_body_bytes: int = Field(default=32 << 20, gt=0)
    """Size of a request body, bytes."""
    max_rows: int = Field(default=8192, gt=0, le=MOST_ROWS)
    """Rows of a request."""
    max_steps: int = Field(default=1000, gt=0)
    """Grid intervals of the solver."""
    max_probes: int = Field(default=256, gt=0)
    """Trace probes of a row at each step; an exact trace is limited by max_work alone."""
    max_values: int = Field(default=8 << 20, gt=0)
    """Numbers in an answer: rows times width."""
    max_work: int = Field(default=32 << 20, gt=0)
    """Passes of single rows through the network: rows x steps x (2 + probes, or 2 + d for an exact trace)."""
    max_text_chars: int = Field(default=100_000, gt=0)
    """Characters of a text or prompt."""
    max_tokens: int = Field(default=512, gt=0)
    """New tokens of a generation."""


class AppConfig(Config):
    """What ``serve.app:app`` takes as arguments: everything but the address, which is Serve's own option."""

    prior: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(min_length=1)
    """Prior to serve, a folder or hub id, or NAME=FOLDER; give it again for more.
    The unnamed one, else the first, answers requests that name no `model`."""
    replicas: int = Field(default=1, gt=0)
    """Processes that hold each prior (the least, when max_replicas is more)."""
    max_replicas: int | None = None
    """Most processes for each prior: Serve adds and removes them with the load. None: always `replicas`."""
    ingress_replicas: int = Field(default=1, gt=0)
    """Processes that read and check requests."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs reserved for each process of a prior; also its number of threads, rounded down, at least 1."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs for each process of a prior, fractions allowed; 0 computes on CPU."""
    precision: PrecisionOption = "auto"
    """Of the matrix products of priors; states and sums are float32. auto is bfloat16 where a process's device is fast
    in it, else float32; `GET /v1/models` says which."""
    max_batch_rows: int = Field(default=1024, gt=0)
    """Rows of one solver call: small requests are joined up to it, large ones cut."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long an idle prior waits for more rows before it starts on the first, milliseconds; only while requests come
    several at a time."""
    max_ongoing_requests: int = Field(default=128, gt=0)
    """Requests that one process of a prior holds at a time, waiting to be joined or being computed."""
    max_queued_requests: int = Field(default=256, gt=0)
    """Requests that wait for a process of a prior; more are refused with 503 and Retry-After."""
    retry_after_s: float = Field(default=1.0, ge=0)
    """What Retry-After says when the queue is full, seconds."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for an answer (of a stream: for its next event), seconds; then 503."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """How long the body of a request may take to arrive, seconds; then 408."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that a process being replaced or stopped has to finish its requests."""
    hung_s: float = Field(default=900.0, gt=0)
    """A solver call that takes longer is taken for hung and its process replaced, seconds."""
    auth: Literal["tokens", "none"] | None = None
    """`tokens`: requests need a bearer token, from DMM_SERVE_TOKENS or token_file; `none`: nobody needs one.
    None: tokens are required, except by `dmm serve` on a loopback address when none are given."""
    token_file: str | None = None
    """File with one token a line, on every node that reads requests; read again when it changes."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Origins whose pages may ask from a browser, such as https://lab.example; none by default."""
    model: str | None = None
    """Language model for the text routes: a folder, a .gguf file or a hub id; None: no text routes."""
    directions: str | None = None
    """Folder of steering directions, one safetensors file each; needs model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    subject_replicas: int = Field(default=1, gt=0)
    """Processes that hold the language model (and a copy of each prior)."""
    subject_cpus: float = Field(default=1.0, ge=0)
    """CPUs reserved for each process of the language model."""
    subject_gpus: float = Field(default=0.0, ge=0)
    """GPUs for each process of the language model, fractions allowed; 0 computes on CPU."""
    compute_dtype: PrecisionOption = "auto"
    """Number format of the language model's computation; auto as for precision."""
    max_ongoing_texts: int = Field(default=8, gt=0)
    """Text requests that one process of the language model holds at a time."""
    limits: Limits = Limits()
    """Limits on one request."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [name for name, _ in self._pairs()]
        if len(set(names)) != len(names):
            raise ValueError("prior: each name once, and at most one prior without a name; write NAME=FOLDER")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas: at least replicas ({self.replicas}) or unset (got {self.max_replicas})"
            )
        if self.auth == "none" and self.token_file is not None:
            raise ValueError("auth: none, and a token_file; give one of them")
        if self.directions is not None and self.model is None:
            raise ValueError("directions: only with a model to steer; give model too")
        return self

    def _pairs(self) -> list[tuple[str, str]]:
        found = ((NAMED_PRIOR.fullmatch(text), text) for text in self.prior)
        return [(match[1], match[2]) if match else (DEFAULT_NAME, text) for match, text in found]

    @property
    def priors(self) -> dict[str, str]:
        """Folder or hub id by name, local folders made absolute; the default prior comes first."""
        pairs = sorted(self._pairs(), key=lambda pair: pair[0] != DEFAULT_NAME)
        return {name: _absolute(uri) for name, uri in pairs}

    @property
    def subject(self) -> tuple[str, str | None] | None:
        """The language model and the folder of directions, local folders made absolute; None without a model."""
        if self.model is None:
            return None
        return _absolute(self.model), None if self.directions is None else _absolute(self.directions)


class ServeConfig(AppConfig):
    """`dmm serve`: answer questions about activations (and texts, with a model) over HTTP until interrupted."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    proxy: Literal["serve", "haproxy"] = "serve"
    """Who takes requests in: Serve's own proxy, or the HAProxy that Ray brings along (Linux), which adds a third of the
    time to a request. Its statistics are open on ports 8404 and 9101 of every address of this machine."""
