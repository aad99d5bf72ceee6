"""Rows that are unnatural in known ways: edited activations, shuffled text and other domains, at the same positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_ray.seeds import numpy_rng, torch_rng
from dmm_ray.subject import SubjectModel

SCALES = (0.5, 0.8, 1.2)


class TokenRun(NamedTuple):
    """Consecutive tokens of a document: its number, their first position, and all of the document's tokens."""

    doc: int
    start: int
    tokens: list[int]


def draw_runs(tokens: dict[int, list[int]], width: int, runs: int, seed: int) -> list[TokenRun]:
    """At most ``runs`` runs of ``width`` tokens, one per document, starting at random positions after 0."""
    rng = numpy_rng(seed)
    long_enough = [doc for doc in tokens if len(tokens[doc]) > width]
    chosen = rng.permutation(long_enough)[:runs].tolist()
    return [TokenRun(doc, int(rng.integers(1, len(tokens[doc]) - width + 1)), tokens[doc]) for doc in chosen]


def matched(runs: Sequence[TokenRun], others: Iterator[list[int]], width: int) -> list[TokenRun]:
    """Runs at the same positions in ``others``, each the next long enough one, with the original document numbers."""
    found = []
    for run in runs:
        long_enough = (ids for ids in others if len(ids) >= run.start + width)
        if (ids := next(long_enough, None)) is None:
            break
        found.append(TokenRun(run.doc, run.start, ids))
    return found


def shuffled_tokens(runs: Sequence[TokenRun], seed: int) -> list[TokenRun]:
    """The same documents with the order of all tokens after the first randomised."""
    rng = numpy_rng(seed)
    return [run._replace(tokens=[run.tokens[0], *rng.permutation(run.tokens[1:]).tolist()]) for run in runs]


def shuffled_words(text: str, seed: int) -> str:
    """The words of the text, split at whitespace, in random order."""
    return " ".join(numpy_rng(seed).permutation(text.split()).tolist())


def activations(subject: SubjectModel, runs: Sequence[TokenRun], layer: int, width: int) -> Tensor:
    """The rows of all runs, concatenated, (runs * width, d) in the subject's dtype."""
    found = []
    for run in runs:
        hidden = subject.capture(*subject.pad([run.tokens[: run.start + width]]), [layer])[layer]
        found.append(hidden[0, run.start : run.start + width])
    return torch.cat(found)


def row_ids(runs: Sequence[TokenRun], width: int) -> Tensor:
    """Document and position of each row, (runs * width, 2) int64."""
    return torch.tensor([(run.doc, run.start + i) for run in runs for i in range(width)])


def edited(x: Tensor, mean: Tensor, covariance: Tensor, seed: int) -> dict[str, Tensor]:
    """Unnatural rows (n, d) derived from natural rows ``x``: scaled, permuted, Gaussian noise, the mean.

    Args:
        x: (n, d) raw activations.
        mean: (d,) mean of natural rows.
        covariance: (d, d) covariance of natural rows, float64.
        seed: seed of the noise and the permutation.
    """
    generator = torch_rng(seed)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()).to(x)
    noise = torch.randn(x.shape, generator=generator).to(x)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    found = {f"rows x {scale}": x * scale for scale in SCALES}
    found["dimensions permuted"] = x[:, order]
    found["noise of the same covariance"] = mean.to(x) + noise @ root.T
    found["the mean row"] = mean.to(x).expand_as(x).clone()
    return found
