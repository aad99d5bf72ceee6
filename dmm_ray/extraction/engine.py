"""One unit of documents in, one shard per layer out: tokenise, run the subject, scatter, write, record."""

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
    """How an engine holds the model; nothing here changes what it computes."""

    batch_tokens: int
    threads: int
    device: str
    trust_remote_code: bool = False
    device_map: str | None = None
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None


@dataclass(frozen=True)
class ExtractionTask:
    """What every engine of a run is told."""

    out: str
    manifest: Manifest
    max_failed: int
    loading: Loading


class Engine:
    """Extracts units with a truncated subject that it loads at the first one.

    ``extract`` may be called from several threads: one of its own runs the model while they read, tokenise and write.
    (If each ran it in turn, each would have OpenMP threads, more in all than cores, which then hardly spin.)
    """

    def __init__(self, task: ExtractionTask, corpus: Corpus) -> None:
        self.task = task
        self.corpus = corpus
        self._thread = ThreadPoolExecutor(1, "dmm-subject")
        self._tokenising = Lock()

    @cached_property
    def forward(self) -> Forward:
        """The model and how rows are taken from it, loaded at the first unit."""
        return load_forward(self.task.manifest, self.task.loading)

    @cached_property
    def tokenizer(self) -> Any:
        """The subject's; once it is there, units are tokenised while the model runs on others."""
        return self._thread.submit(lambda: self.forward.subject.tokenizer).result()

    def extract(self, unit: Unit, turn: Callable[[], AbstractContextManager[None]] = nullcontext) -> Record:
        """Extract and, in a ``turn``, write the shards, then the moments, then the record; a unit that has its record
        is done, unless a straggler of another run left it.

        Raises:
            UserError: more documents failed than are to be skipped.
            OSError: the store cannot be written.
        """
        m, name = self.task.manifest, join(self.task.out, record_name(unit.unit))
        if exists(name) and (done := read_record(self.task.out, unit.unit)).config_hash == m.config_hash:
            return done
        documents = list(self.corpus.read(unit.first, unit.stop))
        tokenizer = self.tokenizer
        with self._tokenising:  # a tokenizer is not made for several threads
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
    """Holds an engine."""

    memory_options = "--batch-tokens or --rows-per-shard"

    def __init__(self, task: ExtractionTask, corpus: Corpus) -> None:
        super().__init__(task.out)
        self.engine = Engine(task, corpus)

    def work(self, unit: Unit) -> dict[str, Any]:
        """How many ``rows`` the unit has, how many documents ``failed`` and the last ``failure``."""
        record = self.engine.extract(unit, self.turn)
        failure = record.failed[-1][1] if record.failed else None
        return {"rows": record.rows, "failed": len(record.failed), "failure": failure}


def load_forward(manifest: Manifest, loading: Loading) -> Forward:
    """The truncated subject on its device. Raises UserError where there is no such device or model."""
    if loading.device == "cuda" and not torch.cuda.is_available():
        raise UserError("gpus_per_actor: torch finds no GPU in the actor; install its CUDA build or give 0")
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
    # A node may have fetched other code than the one where the job was started, or have other versions.
    if changed := changed_part(subject.source, manifest, files=False):
        raise UserError(
            f"model: {manifest.subject.id}: {changed} is another where the actor runs than where the job was started; "
            "give every node the same model and the same versions of the libraries"
        )
    return Forward(subject, manifest.layers, manifest.torch_dtype, loading.batch_tokens, manifest.window)


class Read(NamedTuple):
    """Documents as pieces."""

    pieces: list[DocumentPiece]
    """In the order of the documents."""
    long: int
    """Documents longer than the window."""
    failed: list[tuple[int, str]]
    """Documents without text, and chats that the template refuses: number and reason."""


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
    """The tokens of each document. What a tokenizer raises is marked with the document that it is about."""
    try:
        return encode(tokenizer, [d.content for d in documents], window)
    except UserError:
        raise
    except Exception:
        for document in documents:
            with concerning(f"document {document.doc}"):
                encode(tokenizer, [document.content], window)
        raise  # it is about all of them together


def _refused(document: Document, tokenizer: Any) -> str | None:
    """Why the chat template does not take a chat."""
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
    """(rows, d) by layer in the stored dtype."""
    moments: dict[int, Moments]
    nonfinite: dict[str, int]
    outliers: dict[str, int]
    excluded: int

    @classmethod
    def of(cls, manifest: Manifest, found: Sequence[DocumentPiece], outputs: Outputs) -> UnitResult:
        """Leave out the rows that are to be excluded; moments of the others."""
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
    """Masks of the rows (n, d) to keep that contain NaN or Inf, and of those whose norm is far above the median."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).cpu()
    finite = torch.isfinite(norm)
    if not finite.all():
        finite = torch.isfinite(rows).all(1).cpu()
    median = norm[finite & keep].median() if (finite & keep).any() else norm.new_tensor(float("inf"))
    return ~finite & keep, finite & keep & (norm > OUTLIER_NORM * median)


def too_many_failed(errors: Sequence[str], limit: int) -> str:
    """One line on documents that failed, quoting the first."""
    more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
    skip = f"skip up to N such documents with --max-failed-documents N (now {limit})"
    return f"text: {errors[0]}{more}; fix it, or {skip}"
