"""One unit of documents in, one shard per layer out: tokenise, run the subject, scatter, write, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.documents import Document
from dmm_ray.activations.manifest import (
    DTYPES,
    FileEntry,
    Manifest,
    Record,
    moments_name,
    record_name,
    shard_name,
    write_moments,
)
from dmm_ray.activations.moments import Moments
from dmm_ray.activations.units import Unit, batches
from dmm_ray.activations.writer import write_shard
from dmm_ray.errors import UserError
from dmm_ray.files import join, write_bytes
from dmm_ray.subject import SubjectModel


@dataclass(frozen=True)
class Task:
    """What every engine of a run is told."""

    out: str
    manifest: Manifest
    batch_tokens: int
    max_failed: int
    threads: int
    device: str
    trust_remote_code: bool


class Engine:
    """Extracts units with a truncated subject that it loads at the first one."""

    def __init__(self, task: Task, corpus: Corpus) -> None:
        torch.set_num_threads(task.threads)
        self.task = task
        self.corpus = corpus

    @cached_property
    def subject(self) -> SubjectModel:
        """The model, loaded at the first unit."""
        m = self.task.manifest
        if self.task.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "gpus_per_actor: torch finds no GPU in the actor; install its CUDA build or give 0"
            )
        return SubjectModel.from_pretrained(
            m.subject.id,
            layers=m.layers,
            device=self.task.device,
            dtype=DTYPES[m.compute_dtype],
            revision=m.subject.revision,
            block_path=m.subject.block_path,
            trust_remote_code=self.task.trust_remote_code,
        )

    def extract(self, unit: Unit) -> Record:
        """Extract, write the shards, then the moments, then the record."""
        m = self.task.manifest
        documents = list(self.corpus.read(unit.first, unit.stop))
        failed = [d for d in documents if d.error]
        if len(failed) > self.task.max_failed:
            raise UserError(too_many_failed(failed, self.task.max_failed))
        ids, cut = self._tokenize(documents)
        table = _row_table(ids, unit.first, 0 if m.keep_first else 1)
        activations, padding = self._forward(ids, table.starts, table.rows)
        files: dict[str, FileEntry] = {}
        moments: dict[int, Moments] = {}
        nonfinite: dict[str, int] = {}
        for layer in m.layers:
            name = shard_name(layer, unit.unit)
            rows = activations.pop(layer)
            files[name] = write_shard(
                join(self.task.out, name), rows, table.doc, table.position, table.token_id
            )
            moments[layer], nonfinite[str(layer)] = Moments.of(rows)
        name = moments_name(unit.unit)
        files[name] = write_moments(self.task.out, name, moments)
        record = Record(
            unit=unit.unit,
            first_document=unit.first,
            documents=len(documents),
            failed=tuple((d.doc, d.error or "") for d in failed),
            cut=cut,
            tokens=sum(map(len, ids)),
            padding=padding,
            rows=table.rows,
            nonfinite=nonfinite,
            files=files,
        )
        write_bytes(
            join(self.task.out, record_name(unit.unit)), record.model_dump_json(indent=2).encode() + b"\n"
        )
        return record

    def _tokenize(self, documents: Sequence[Document]) -> tuple[list[list[int]], int]:
        """Token ids per document, none for blank and failed ones; how many were longer than the window."""
        window = self.task.manifest.window
        ids: list[list[int]] = [[] for _ in documents]
        filled = [i for i, d in enumerate(documents) if d.text and d.text.strip()]
        for i, tokens in zip(
            filled, self.subject.tokenize([documents[i].text or "" for i in filled], window + 1), strict=True
        ):
            ids[i] = tokens
        cut = sum(len(tokens) > window for tokens in ids)
        return [tokens[:window] for tokens in ids], cut

    def _forward(self, ids: list[list[int]], starts: np.ndarray, rows: int) -> tuple[dict[int, Tensor], int]:
        """Every row's activation by layer, (rows, d) in the stored dtype on the CPU; padding tokens run."""
        m, skip, padding = self.task.manifest, 0 if self.task.manifest.keep_first else 1, 0
        out = {layer: torch.empty(rows, m.d, dtype=m.torch_dtype) for layer in m.layers}
        lengths = [len(tokens) if len(tokens) > skip else 0 for tokens in ids]
        for group in batches(lengths, self.task.batch_tokens):
            input_ids, mask = self.subject.pad([ids[i] for i in group])
            captured = self.subject.capture(input_ids, mask, m.layers)
            padding += int(mask.numel() - mask.sum())
            kept = mask[:, skip:].bool()
            target = torch.from_numpy(starts[group])[:, None] + torch.arange(kept.shape[1])
            target = target[kept.cpu()]
            for layer, hidden in captured.items():
                out[layer][target] = hidden[:, skip:][kept].to(m.torch_dtype).cpu()
        return out, padding


@dataclass(frozen=True)
class RowTable:
    """Where the rows of a unit's documents lie, and their identity columns."""

    starts: np.ndarray
    """(documents,) int64: each document's first row."""
    doc: np.ndarray
    position: np.ndarray
    token_id: np.ndarray

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.doc)


def _row_table(ids: list[list[int]], first: int, skip: int) -> RowTable:
    """The rows of documents ``first``, ``first`` + 1, ... with tokens ``ids``, from position ``skip`` on."""
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    counts = np.maximum(lengths - skip, 0)
    starts = np.cumsum(counts) - counts
    doc = np.repeat(np.arange(first, first + len(ids), dtype=np.int64), counts)
    position = np.arange(len(doc), dtype=np.int64) - np.repeat(starts, counts) + skip
    flat = np.concatenate(
        [np.empty(0, np.int32), *(np.asarray(tokens[skip:], dtype=np.int32) for tokens in ids)]
    )
    return RowTable(starts, doc, position.astype(np.int32), flat)


def too_many_failed(failed: Sequence[Document], limit: int) -> str:
    """One line on documents without text, naming the first."""
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    skip = f"skip up to N such documents with --max-failed-documents N (now {limit})"
    return f"text: {failed[0].error}{more}; mend it, or {skip}"
