"""The delta LM loss: how much worse the language model predicts after a layer is noised and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dmm_ray.baselines import PCA, SAE
from dmm_ray.evaluation.data import EvaluationInputs
from dmm_ray.evaluation.methods import Methods
from dmm_ray.prior.flow import interpolate
from dmm_ray.prior.noise import STREAM_PATH, normal
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject import Intervention, Site, SubjectModel

LM_BATCH_TOKENS = 4096


class Documents:
    """Documents run through a subject: the rows of a layer, and the loss of the token after each.

    Rows are the positions from 1 on, document by document; a document's last row has no next token, so its loss is NaN.
    """

    def __init__(self, subject: SubjectModel, layer: int, tokens: Mapping[int, Sequence[int]]) -> None:
        self.subject = subject
        self.layer = layer
        self.tokens = {doc: list(ids) for doc, ids in tokens.items() if len(ids) > 2}
        lengths = [len(ids) - 1 for ids in self.tokens.values()]
        self._start = dict(zip(self.tokens, np.cumsum([0, *lengths]).tolist(), strict=False))
        pairs = [(doc, position) for doc, ids in self.tokens.items() for position in range(1, len(ids))]
        self.ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)

    def capture(self) -> Tensor:
        """The layer's rows (n, d), float32, on the CPU."""
        rows = torch.empty(len(self.ids), self.subject.d)
        for docs, input_ids, mask in self._batches():
            hidden = self.subject.capture(input_ids, mask, [self.layer])[self.layer].float().cpu()
            for line, doc in enumerate(docs):
                rows[self._slice(doc)] = hidden[line, 1 : len(self.tokens[doc])]
        return rows

    def losses(self, rows: Tensor | None = None) -> np.ndarray:
        """Loss of the token after each row in nats, (n,); the layer's rows are replaced by ``rows`` (n, d) if given."""
        found = np.full(len(self.ids), np.nan)
        for docs, input_ids, mask in self._batches():
            edits = [] if rows is None else [self._replacing(docs, rows)]
            losses = self.subject.token_losses(input_ids, mask, edits).double().numpy(force=True)
            for line, doc in enumerate(docs):
                length = len(self.tokens[doc])
                found[self._slice(doc)][: length - 2] = losses[line, 1 : length - 1]
        return found

    def deltas(self, restored: Sequence[Tensor], base: np.ndarray) -> np.ndarray:
        """How much the losses rise over ``base`` (n,) with the layer's rows replaced, averaged over draws of (n, d)."""
        return np.mean([self.losses(rows) for rows in restored], axis=0) - base

    def _replacing(self, docs: Sequence[int], rows: Tensor) -> Intervention:
        """An intervention that replaces the layer's activations in a batch of documents by ``rows``."""
        start = torch.tensor([self._start[doc] - 1 for doc in docs])  # a document's rows begin at position 1

        def edit(x: Tensor, ids: Tensor) -> Tensor:
            sequences, positions = ids.cpu().T
            return rows[start[sequences] + positions].to(x)

        return Intervention(Site(self.layer), edit)

    def _slice(self, doc: int) -> slice:
        start = self._start[doc]
        return slice(start, start + len(self.tokens[doc]) - 1)

    def _batches(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield batches of documents of similar length with their padded tokens and mask."""
        batch: list[int] = []
        for doc in sorted(self.tokens, key=lambda doc: -len(self.tokens[doc])):
            if batch and (len(batch) + 1) * len(self.tokens[batch[0]]) > LM_BATCH_TOKENS:
                yield batch, *self.subject.pad([self.tokens[d] for d in batch])
                batch = []
            batch.append(doc)
        if batch:
            yield batch, *self.subject.pad([self.tokens[d] for d in batch])


def draw(tokens: Mapping[int, Sequence[int]], n: int, seed: int) -> dict[int, Sequence[int]]:
    """``n`` documents drawn at random with ``seed``, ordered by number."""
    docs = numpy_rng(seed).permutation(sorted(tokens))[:n]
    return {int(doc): tokens[int(doc)] for doc in sorted(docs)}


def restorations(
    inputs: EvaluationInputs, methods: Methods, rows: Tensor, ids: Tensor, u: float, seed: int
) -> Iterator:
    """Yield (name, restored raw rows (n, d)) for every method, from the same rows noised to level u.

    Each method restores by its posterior mean; the prior's is named ``prior_mean``.
    """
    prior, row = inputs.prior, inputs.prior.layer_index(inputs.layer)
    z = prior.normalizer.normalize(rows.to(prior.device), row)
    z_u = interpolate(z, normal(seed, ids.to(prior.device), prior.d, STREAM_PATH), u)
    for name, method in methods.denoisers.items():
        restored = prior.normalizer.denormalize(method.posterior_mean(z_u, u), row).cpu()
        yield "prior_mean" if name == "prior" else name, restored


def sampled(inputs: EvaluationInputs, rows: Tensor, ids: Tensor, u: float, seed: int) -> Tensor:
    """Raw rows (n, d) restored by the prior's default ``denoise``, with the same noise as in :func:`restorations`."""
    return inputs.prior.denoise(rows, u=u, layer=inputs.layer, ids=ids, seed=seed).cpu()


def plain(inputs: EvaluationInputs, methods: Methods, rows: Tensor) -> Iterator:
    """Yield (name, rows (n, d)) of the published protocol: the baselines' reconstructions of rows without noise."""
    prior, row = inputs.prior, inputs.prior.layer_index(inputs.layer)
    z = prior.normalizer.normalize(rows.to(prior.device), row)
    found: dict[str, PCA | SAE] = {"pca": methods.pca, "sae": methods.sae_plain.sae}
    if methods.sae_pretrained is not None:
        found["sae_pretrained"] = methods.sae_pretrained
    for name, method in found.items():
        yield name, prior.normalizer.denormalize(method.reconstruct(z), row).cpu()
