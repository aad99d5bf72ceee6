"""Turns a unit of documents into one shard per layer: tokenise, run the subject, scatter, write, record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.extraction.forward import Forward, Outputs
from dmm_ray.extraction.identity import changed_part
from dmm_ray.extraction.pieces import DocumentPiece, RowTable, pieces
from dmm_ray.failures import concerning
from dmm_ray.files import exists, join, write_bytes
from dmm_ray.store.manifest import (
    DTYPES,
    OUTLIER_NORM,
    FileEntry,
    Manifest,
    Record,
    moments_name,
    read_record,
    record_name,
    shard_name,
    write_moments,
)
from dmm_ray.store.moments import Moments
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.store.writer import write_shard
from dmm_ray.subject import SubjectModel
from dmm_ray.subject.encoding import ChatRefusedError, Encoded, encode, render_chat
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.unit import Unit


@dataclass(frozen=True)
class Loading:
    """How an engine loads the model; none of this affects what it computes."""

    batch_tokens: int
    threads: int
    device: str
    trust_remote_code: bool = False
    device_map: str | None = None
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None


@dataclass(frozen=True)
class ExtractionTask:
    """The parameters shared by all engines of a run."""

    out: str
    manifest: Manifest
    max_failed: int
    loading: Loading


class Engine:
    """Extracts units with a truncated subject, loaded for the first unit.

    ``extract`` may be called from several threads: they read, tokenise and write while a dedicated thread runs the
    model. (If every thread ran the model, each would have its own OpenMP threads, more in total than cores, and
    oversubscribed OpenMP threads hardly spin.)
    """

    def __init__(self, task: ExtractionTask, corpus: Corpus) -> None:
        self.task = task
        self.corpus = corpus
        self._thread = ThreadPoolExecutor(1, "dmm-subject")
        self._tokenising = Lock()

    @cached_property
    def forward(self) -> Forward:
        """The model and its batching, loaded for the first unit."""
        return load_forward(self.task.manifest, self.task.loading)

    @cached_property
    def tokenizer(self) -> Any:
        """The subject's tokenizer; once loaded, units are tokenised while the model runs on other units."""
        return self._thread.submit(lambda: self.forward.subject.tokenizer).result()

    def extract(self, unit: Unit, turn: Callable[[], AbstractContextManager[None]] = nullcontext) -> Record:
        """Extract a unit and, in a ``turn``, write the shards, then the moments, then the record. A unit that has a
        record is already done, unless the record was left by a straggler of a different run.

        Raises:
            UserError: more documents failed than may be skipped.
            OSError: the store is not writable.
        """
        m, name = self.task.manifest, join(self.task.out, record_name(unit.unit))
        if exists(name) and (done := read_record(self.task.out, unit.unit)).config_hash == m.config_hash:
            return done
        documents = list(self.corpus.read(unit.first, unit.stop))
        tokenizer = self.tokenizer
        with self._tokenising:  # tokenizers are not thread-safe
            read = read_pieces(documents, m.window, m.kept, m.seed, tokenizer)
        outputs, result = self._thread.submit(self._run, read.pieces).result()
        failed = read.failed + sorted(outputs.failed.items())
        if len(failed) > self.task.max_failed:
            raise UserError(too_many_failed([error for _, error in failed], self.task.max_failed))
        with turn():
            record = Record(
                config_hash=m.config_hash,
                unit=unit.unit,
                first_document=unit.first,
                documents=len(documents),
                failed=tuple(failed),
                long=read.long,
                tokens=sum(len(piece.ids) for piece in read.pieces),
                padding=outputs.padding,
                rows=result.table.rows,
                excluded=result.excluded,
                nonfinite=result.nonfinite,
                outliers=result.outliers,
                files=self._write(unit.unit, result),
            )
            write_bytes(name, record.model_dump_json(indent=2).encode() + b"\n")
        return record

    def _run(self, pieces: Sequence[DocumentPiece]) -> tuple[Outputs, UnitResult]:
        outputs = self.forward(pieces)
        return outputs, UnitResult.of(self.task.manifest, pieces, outputs)

    def _write(self, unit: int, result: UnitResult) -> dict[str, FileEntry]:
        files: dict[str, FileEntry] = {}
        table = result.table
        for layer in self.task.manifest.layers:
            name, rows = shard_name(layer, unit), result.rows.pop(layer).cpu()
            files[name] = write_shard(
                join(self.task.out, name), rows, table.doc, table.position, table.token_id
            )
        name = moments_name(unit)
        files[name] = write_moments(self.task.out, name, result.moments)
        return files


class Extractor(UnitActor):
    """An actor that holds an engine."""

    memory_options = "--batch-tokens or --rows-per-shard"

    def __init__(self, task: ExtractionTask, corpus: Corpus) -> None:
        super().__init__(task.out)
        self.engine = Engine(task, corpus)

    def work(self, unit: Unit) -> dict[str, Any]:
        """The number of ``rows`` of the unit, the number of documents that ``failed``, and the last ``failure``."""
        record = self.engine.extract(unit, self.turn)
        failure = record.failed[-1][1] if record.failed else None
        return {"rows": record.rows, "failed": len(record.failed), "failure": failure}


def load_forward(manifest: Manifest, loading: Loading) -> Forward:
    """The truncated subject on its device. Raises UserError if the device or model is missing."""
    if loading.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "gpus_per_actor: torch finds no GPU in the actor; install a CUDA build of torch or set it to 0"
        )
    torch.set_num_threads(loading.threads)
    subject = SubjectModel.from_pretrained(
        manifest.subject.id,
        layers=manifest.layers,
        device=loading.device,
        dtype=DTYPES[manifest.compute_dtype],
        revision=manifest.subject.revision,
        block_path=manifest.subject.block_path,
        trust_remote_code=loading.trust_remote_code,
        device_map=loading.device_map,
        max_memory=loading.max_memory,
        offload_folder=loading.offload_folder,
    )
    # The actor's node may have different code or library versions than the node where the job was started.
    if changed := changed_part(subject.source, manifest, files=False):
        raise UserError(
            f"model: {manifest.subject.id}: {changed} on the actor's node differs from where the job was started; "
            "give every node the same model and the same library versions"
        )
    return Forward(subject, manifest.layers, manifest.torch_dtype, loading.batch_tokens, manifest.window)


class Read(NamedTuple):
    """Documents split into pieces."""

    pieces: list[DocumentPiece]
    """In the order of the documents."""
    long: int
    """Documents longer than the window."""
    failed: list[tuple[int, str]]
    """Documents without text and chats rejected by the template: number and reason."""


def read_pieces(
    documents: Sequence[Document], window: int, kept: TokenSelection, seed: int, tokenizer: Any
) -> Read:
    """The pieces of every document that has text."""
    failed = [(d.doc, error) for d in documents if (error := d.error or _refused(d, tokenizer))]
    without = {doc for doc, _ in failed}
    filled = [d for d in documents if d.doc not in without]
    split = kept.long_documents == "split"
    encoded = _encode(tokenizer, filled, None if split else window)
    bos = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found: list[DocumentPiece] = []
    for document, tokens in zip(filled, encoded, strict=True):
        if tokens.ids:
            found += pieces(tokens, document.doc, window, kept, seed, bos)
    return Read(found, sum(tokens.length > window for tokens in encoded), failed)


def _encode(tokenizer: Any, documents: Sequence[Document], window: int | None) -> list[Encoded]:
    """The tokens of each document. Exceptions of a tokenizer are marked with the document that caused them."""
    try:
        return encode(tokenizer, [d.content for d in documents], window)
    except UserError:
        raise
    except Exception:
        for document in documents:
            with concerning(f"document {document.doc}"):
                encode(tokenizer, [document.content], window)
        raise  # no single document is the cause


def _refused(document: Document, tokenizer: Any) -> str | None:
    """Why the chat template rejects the chat in ``document``; None if it does not."""
    if document.messages is None:
        return None
    try:
        with concerning(f"document {document.doc}"):
            render_chat(tokenizer, document.messages)
    except ChatRefusedError as e:
        return f"document {document.doc}: {e}"
    return None


@dataclass
class UnitResult:
    """A unit's rows, ready to be written."""

    table: RowTable
    rows: dict[int, Tensor]
    """(rows, d) by layer, in the stored dtype."""
    moments: dict[int, Moments]
    nonfinite: dict[str, int]
    outliers: dict[str, int]
    excluded: int

    @classmethod
    def of(cls, manifest: Manifest, found: Sequence[DocumentPiece], outputs: Outputs) -> UnitResult:
        """Drop the rows to be excluded and compute the moments of the rest."""
        table, rows = RowTable.of(found), dict(outputs.rows)
        good = np.array([piece.doc not in outputs.failed for piece in found], dtype=bool)
        keep = torch.from_numpy(np.repeat(good, [len(piece.kept) for piece in found]))
        flags = {layer: _flags(x, keep) for layer, x in rows.items()}
        excluded = torch.zeros_like(keep)
        for bad, far in flags.values():
            excluded |= bad if "nonfinite" in manifest.exclude else False
            excluded |= far if "outliers" in manifest.exclude else False
        mask = keep & ~excluded
        if not mask.all():
            table = table.only(mask.numpy())
            rows = {layer: x[mask.to(x.device)] for layer, x in rows.items()}
        return cls(
            table,
            rows,
            {layer: Moments.of(x, manifest.covariance)[0] for layer, x in rows.items()},
            {str(layer): int(bad.sum()) for layer, (bad, _) in flags.items()},
            {str(layer): int(far.sum()) for layer, (_, far) in flags.items()},
            int(excluded.sum()),
        )


def _flags(rows: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the rows (n, d) to ``keep`` that contain NaN or Inf, and of those with a norm far above the median."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).cpu()
    finite = torch.isfinite(norm)
    if not finite.all():
        finite = torch.isfinite(rows).all(1).cpu()
    median = norm[finite & keep].median() if (finite & keep).any() else norm.new_tensor(float("inf"))
    return ~finite & keep, finite & keep & (norm > OUTLIER_NORM * median)


def too_many_failed(errors: Sequence[str], limit: int) -> str:
    """The message for failed documents, quoting the first error."""
    more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
    skip = f"skip up to N such documents with --max-failed-documents N (now {limit})"
    return f"text: {errors[0]}{more}; fix it, or {skip}"
