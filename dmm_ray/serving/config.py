"""Configuration of the endpoint: what it serves, how it is deployed, and its limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dmm_ray.config import Config
from dmm_ray.precision import PrecisionOption

MOST_ROWS = 1 << 16
"""Upper bound on rows, and on numbers per row, in any configuration."""
DEFAULT_NAME = "default"
NAMED_PRIOR = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)")


def _listed(value: object) -> object:
    """Accept a single string: ``serve run`` passes every argument as one."""
    return (value,) if isinstance(value, str) else value


def _absolute(uri: str) -> str:
    return str(Path(uri).absolute()) if Path(uri).is_dir() else uri


class Limits(Config):
    """Limits of one request; larger ones are refused with 413."""

    max_body_bytes: int = Field(default=32 << 20, gt=0)
    """Size of a request body in bytes."""
    max_rows: int = Field(default=8192, gt=0, le=MOST_ROWS)
    """Rows per request."""
    max_steps: int = Field(default=1000, gt=0)
    """Grid intervals of the solver."""
    max_probes: int = Field(default=256, gt=0)
    """Trace probes per row and step; an exact trace is limited by max_work alone."""
    max_values: int = Field(default=8 << 20, gt=0)
    """Numbers in an answer: rows times width."""
    max_work: int = Field(default=32 << 20, gt=0)
    """Single-row passes through the network: rows x steps x (2 + probes, or 2 + d for an exact trace)."""
    max_text_chars: int = Field(default=100_000, gt=0)
    """Characters in a text or prompt."""
    max_tokens: int = Field(default=512, gt=0)
    """New tokens per generation."""


class AppConfig(Config):
    """The arguments of ``serve.app:app``: everything but the address, which is one of Serve's own options."""

    prior: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(min_length=1)
    """Prior to serve: a folder or hub id, or NAME=FOLDER; repeat for more priors.
    The unnamed one, else the first, answers requests that name no `model`."""
    replicas: int = Field(default=1, gt=0)
    """Replicas of each prior (the minimum if max_replicas is larger)."""
    max_replicas: int | None = None
    """Maximum replicas of each prior, scaled by Serve with the load; defaults to `replicas`."""
    ingress_replicas: int = Field(default=1, gt=0)
    """Replicas of the ingress, which reads and checks requests."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs per replica of a prior; also its number of threads, rounded down, at least 1."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per replica of a prior, fractions allowed; 0 computes on the CPU."""
    precision: PrecisionOption = "auto"
    """Precision of the priors' matrix products; states and sums are float32. auto is bfloat16 if the replica's device
    is fast in it, else float32; `GET /v1/models` shows which."""
    max_batch_rows: int = Field(default=1024, gt=0)
    """Maximum rows per solver call: small requests are batched up to it, larger ones split."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long an idle prior waits for more rows after the first ones, in milliseconds; only while requests arrive
    concurrently."""
    max_ongoing_requests: int = Field(default=128, gt=0)
    """Maximum requests that one replica of a prior holds at a time, waiting to be batched or being computed."""
    max_queued_requests: int = Field(default=256, gt=0)
    """Maximum requests waiting for a replica of a prior; more are refused with 503 and Retry-After."""
    retry_after_s: float = Field(default=1.0, ge=0)
    """Value of Retry-After when the queue is full, in seconds."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Maximum wait for an answer (in a stream, for the next event), in seconds; then 503."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Maximum time for a request body to arrive, in seconds; then 408."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long a replica that is being replaced or stopped may continue its requests, in seconds."""
    hung_s: float = Field(default=900.0, gt=0)
    """A solver call that takes longer is considered hung and its replica is replaced, in seconds."""
    auth: Literal["tokens", "none"] | None = None
    """`tokens`: requests need a bearer token, from DMM_SERVE_TOKENS or token_file; `none`: no token is needed.
    None: tokens are required, except by `dmm serve` on a loopback address if none are given."""
    token_file: str | None = None
    """File with one token per line, on every node with an ingress replica; reloaded when it changes."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Origins whose pages may send requests from a browser, such as https://lab.example; none by default."""
    model: str | None = None
    """Language model for the text routes: a folder, a .gguf file or a hub id; None: no text routes."""
    directions: str | None = None
    """Folder of steering directions, one safetensors file each; requires model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    subject_replicas: int = Field(default=1, gt=0)
    """Replicas of the language model (each with a copy of every prior)."""
    subject_cpus: float = Field(default=1.0, ge=0)
    """CPUs per replica of the language model."""
    subject_gpus: float = Field(default=0.0, ge=0)
    """GPUs per replica of the language model, fractions allowed; 0 computes on the CPU."""
    compute_dtype: PrecisionOption = "auto"
    """Dtype of the language model's computation; auto as for precision."""
    max_ongoing_texts: int = Field(default=8, gt=0)
    """Maximum text requests that one replica of the language model holds at a time."""
    limits: Limits = Limits()
    """Limits of one request."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [name for name, _ in self._pairs()]
        if len(set(names)) != len(names):
            raise ValueError("prior: names must be unique, and at most one may be omitted; write NAME=FOLDER")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas: must be at least replicas ({self.replicas}) or unset (got {self.max_replicas})"
            )
        if self.auth == "none" and self.token_file is not None:
            raise ValueError("auth: none conflicts with token_file; give only one of them")
        if self.directions is not None and self.model is None:
            raise ValueError("directions: requires a model to steer; give model too")
        return self

    def _pairs(self) -> list[tuple[str, str]]:
        found = ((NAMED_PRIOR.fullmatch(text), text) for text in self.prior)
        return [(match[1], match[2]) if match else (DEFAULT_NAME, text) for match, text in found]

    @property
    def priors(self) -> dict[str, str]:
        """Folder or hub id by name, local folders as absolute paths; the default prior comes first."""
        pairs = sorted(self._pairs(), key=lambda pair: pair[0] != DEFAULT_NAME)
        return {name: _absolute(uri) for name, uri in pairs}

    @property
    def subject(self) -> tuple[str, str | None] | None:
        """The language model and the folder of directions, local folders as absolute paths; None without a model."""
        if self.model is None:
            return None
        return _absolute(self.model), None if self.directions is None else _absolute(self.directions)


class ServeConfig(AppConfig):
    """`dmm serve`: serve priors (and a language model, if given) over HTTP until interrupted."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    proxy: Literal["serve", "haproxy"] = "serve"
    """Proxy that accepts requests: Serve's own, or the HAProxy bundled with Ray (Linux), which has a third of the
    overhead per request. Its statistics are open on ports 8404 and 9101 of every address of this machine."""
