"""Runs pieces through the subject, packed if possible, else padded by length, and scatters the rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.extraction.batches import packs, padded_batches
from dmm_ray.extraction.pieces import DocumentPiece
from dmm_ray.failures import cause_of
from dmm_ray.subject import SubjectModel

logger = logging.getLogger(__name__)
DOCUMENT_ERRORS = (RuntimeError, IndexError, ValueError)
"""Exceptions of a forward pass caused by its input tokens, including lack of memory for this many; any other exception
is a bug in the model's code."""
HOW = {
    "packed": "packed without padding",
    "padded": "padded by length",
    "alone": "run one by one, as this model's rows would depend on the rest of the batch",
}


@dataclass
class Outputs:
    """The model's outputs for a list of pieces."""

    rows: dict[int, Tensor]
    """(rows, d) by layer in the stored dtype on the model's device, in the order of the pieces."""
    padding: int = 0
    """Number of padding tokens run."""
    failed: dict[int, str] = field(default_factory=dict)
    """Documents whose forward pass failed, with the reason; their rows are undefined."""


class Forward:
    """Runs pieces in batches.

    Args:
        subject: the model.
        layers: block numbers.
        dtype: dtype of the returned rows.
        batch_tokens: maximum tokens per pass, unless a single piece has more.
        longest: maximum tokens per piece.
    """

    def __init__(
        self,
        subject: SubjectModel,
        layers: Sequence[int],
        dtype: torch.dtype,
        batch_tokens: int,
        longest: int,
    ) -> None:
        self.subject = subject
        self.layers = tuple(layers)
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.batching = subject.batching(longest)
        logger.info("sequences are %s", HOW[self.batching])

    def __call__(self, found: Sequence[DocumentPiece]) -> Outputs:
        """The kept rows of all pieces."""
        counts = np.array([len(piece.kept) for piece in found], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        shape = (int(counts.sum()), self.subject.d)
        outputs = Outputs(
            {k: torch.empty(shape, dtype=self.dtype, device=self.subject.device) for k in self.layers}
        )
        group = padded_batches if self.batching == "padded" else packs
        # With a limit of one token, every pack contains a single piece.
        most = 1 if self.batching == "alone" else self.batch_tokens
        for batch in group([len(piece.ids) for piece in found], most):
            self._run(found, starts, batch, outputs)
        return outputs

    def _run(
        self, found: Sequence[DocumentPiece], starts: np.ndarray, batch: list[int], outputs: Outputs
    ) -> None:
        """Run one batch; if it fails, run its halves, down to the document that causes the failure.

        Raises:
            UserError: the model's outputs cannot be captured at all.
            Exception: a bug in the model's code; a note names the document that triggered it.
        """
        try:
            self._scatter(found, starts, batch, outputs)
        except UserError:
            raise
        except Exception as e:
            doc = found[batch[0]].doc
            if len(batch) == 1 and not isinstance(e, DOCUMENT_ERRORS):
                e.add_note(f"document {doc}")
                raise
            reason = f"document {doc}: its forward pass failed: {cause_of(e, '--window')}"
        else:
            return
        # Outside the handler, because the exception keeps the frames, and so the tensors, of the failed pass alive.
        if len(batch) == 1:
            outputs.failed[doc] = reason
            return
        half = len(batch) // 2
        self._run(found, starts, batch[:half], outputs)
        self._run(found, starts, batch[half:], outputs)

    def _scatter(
        self, found: Sequence[DocumentPiece], starts: np.ndarray, batch: list[int], outputs: Outputs
    ) -> None:
        """Run one batch and scatter its rows to their positions."""
        hidden, offsets, padding = self._hidden([found[i].ids for i in batch])
        source = np.concatenate([found[i].kept + at for i, at in zip(batch, offsets, strict=True)])
        target = np.concatenate([starts[i] + np.arange(len(found[i].kept)) for i in batch])
        for layer, x in hidden.items():
            rows = x[torch.from_numpy(source).to(x.device)].to(self.dtype)
            out = outputs.rows[layer]
            out[torch.from_numpy(target).to(out.device)] = rows.to(out.device)
        outputs.padding += padding

    def _hidden(self, ids: Sequence[Sequence[int]]) -> tuple[dict[int, Tensor], list[int], int]:
        """Outputs by layer as (tokens, d), the offset of each sequence in them, and the number of padding tokens."""
        lengths = [len(tokens) for tokens in ids]
        if self.batching == "packed":
            starts = (np.cumsum(lengths) - lengths).tolist()
            return self.subject.capture_packed(ids, self.layers), starts, 0
        input_ids, mask = self.subject.pad(ids)
        captured = self.subject.capture(input_ids, mask, self.layers)
        width = input_ids.shape[1]
        flat = {layer: x.flatten(0, 1) for layer, x in captured.items()}
        return flat, [i * width for i in range(len(ids))], input_ids.numel() - sum(lengths)
