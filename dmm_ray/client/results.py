"""The endpoint's answers, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class LogProbArrays:
    """Log-probabilities of n raw rows; arrays are (n,) float32."""

    nats: np.ndarray
    nats_per_dim: np.ndarray
    stderr: np.ndarray | None
    """Standard error of ``nats`` from the probes; None with a single probe."""
    percentile: np.ndarray | None
    """Percentage of natural activations that are less likely; None for a prior without calibration."""
    latent_percentile: np.ndarray | None
    """Two-sided percentile of the latent norm; None for a prior without calibration."""
    combined_percentile: np.ndarray | None
    """Percentile of the smallest of three: the two above and that of the row's own norm. The one to use; None for a
    prior without calibration."""
    base: np.ndarray
    """log N(z_1; 0, I) of the latent that the row flows to, in nats."""
    divergence: np.ndarray
    """Integral of the velocity's divergence along the path, in nats."""
    evaluations: int
    """Network evaluations per row."""


class TopUnitArrays(NamedTuple):
    """The k hidden units with the largest values in each row, largest first."""

    indices: np.ndarray
    """Indices of the units, int64 (n, k)."""
    values: np.ndarray
    """Values of the units, float32 (n, k)."""


@dataclass(frozen=True)
class TextScore:
    """How natural the language model's activation is at each of n tokens."""

    tokens: tuple[str, ...]
    start: np.ndarray
    """Offset of each token's first character in the text, int64 (n,)."""
    end: np.ndarray
    """Offset of the character after its last one, int64 (n,)."""
    nats: np.ndarray
    """float64 (n,); NaN at position 0, which is never scored."""
    percentile: np.ndarray
    """float64 (n,); NaN at position 0, and everywhere without calibration."""

    @classmethod
    def read(cls, answer: dict[str, Any]) -> TextScore:
        """From the answer of ``/v1/score_text``."""
        columns = {name: [t[name] for t in answer["tokens"]] for name in ("text", "start", "end")}
        scores = [np.array([t[name] for t in answer["tokens"]], float) for name in ("nats", "percentile")]
        places = [np.array(columns[name], np.int64) for name in ("start", "end")]
        return cls(tuple(columns["text"]), *places, *scores)


@dataclass(frozen=True)
class Token:
    """A newly generated token."""

    id: int
    text: str


@dataclass(frozen=True)
class GeneratedText:
    """A generated text."""

    text: str
    tokens: tuple[Token, ...]
    nats: np.ndarray
    """-log p of each token under the language model without steering, float64 (n,)."""
    nll: float | None
    """Mean of ``nats``; None if there are no tokens."""
    finish: str
    """`stop`: the model ended its text; `length`: a limit was reached."""

    @classmethod
    def read(cls, answer: dict[str, Any]) -> GeneratedText:
        """From the answer of ``/v1/generate``, or the last event of its stream."""
        tokens = tuple(Token(t["id"], t["text"]) for t in answer["tokens"])
        nats = np.array([t["nats"] for t in answer["tokens"]], float)
        return cls(answer["text"], tokens, nats, answer["nll"], answer["finish"])


@dataclass(frozen=True)
class Prior:
    """A prior of the endpoint."""

    name: str
    d: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class DirectionName:
    """A direction that ``generate`` takes by name."""

    name: str
    layer: int | None
    """The block it belongs to; None: any."""


@dataclass(frozen=True)
class Subject:
    """The endpoint's language model."""

    name: str
    layers: int
    """Number of blocks."""
    context: int
    """Maximum number of tokens in a text."""
    priors: tuple[str, ...]
    """Names of the priors of its activations."""
    directions: tuple[DirectionName, ...]


@dataclass(frozen=True)
class Models:
    """The priors and the language model of the endpoint."""

    priors: tuple[Prior, ...]
    """The default one first."""
    subject: Subject | None
    """None if there are no text routes."""

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Models:
        """From the answer of ``/v1/models``."""
        priors = tuple(Prior(m["name"], m["d"], tuple(m["layers"])) for m in answer["models"])
        s = answer["subject"]
        if s is None:
            return cls(priors, None)
        directions = tuple(DirectionName(one["name"], one["layer"]) for one in s["directions"])
        return cls(priors, Subject(s["name"], s["layers"], s["context"], tuple(s["priors"]), directions))
