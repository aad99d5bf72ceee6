"""Text files as one numbered sequence of documents, read from any place without reading what is before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dmm_ray.activations.documents import (
    END_OF_TEXT,
    LINES,
    MARKED,
    PARAGRAPHS,
    SUFFIXES,
    Document,
    Format,
    Splitter,
    parse,
    separated_by,
)
from dmm_ray.errors import UserError
from dmm_ray.files import absolute, hash_json, iter_chunks, list_files

STRIDE = 64
"""A byte offset is kept for every 64th document of a file."""
CHECKED_BYTES = 16 << 20
"""The scan parses this much of each file, so that a wrong field name or encoding shows before any work."""
KEPT_PROBLEMS = 100
SCAN_THREADS = 8


@dataclass(frozen=True)
class TextFile:
    """What a scan found in one file."""

    uri: str
    rule: Format
    size: int
    sha256: str
    documents: int
    offsets: np.ndarray
    """int64: byte offset of every 64th document."""
    problems: tuple[Document, ...]
    """Documents without text among the first 16 MiB, numbered within the file; at most 100."""
    blank: int
    """Documents known to be blank."""


@dataclass
class _Tally:
    """Counts one file's documents under one rule."""

    rule: Format
    uri: str
    text_field: str
    splitter: Splitter = field(init=False)
    documents: int = 0
    blank: int = 0
    offsets: list[int] = field(default_factory=list)
    problems: list[Document] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.splitter = Splitter(self.rule)

    def add(self, pieces: Iterator[tuple[int, bytes]]) -> None:
        for offset, raw in pieces:
            if self.documents % STRIDE == 0:
                self.offsets.append(offset)
            if offset < CHECKED_BYTES:
                self._check(raw)
            self.documents += 1

    def _check(self, raw: bytes) -> None:
        text, error = parse(raw, self.rule, self.text_field)
        if error and len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(
                Document(self.documents, None, located(self.uri, self.rule, self.documents, error))
            )
        self.blank += text is not None and not text.strip()


def located(uri: str, rule: Format, number: int, error: str) -> str:
    """``error`` with the file and the line or document, counted from 1, that it is about."""
    return f"{uri}: {'line' if rule.is_json else 'document'} {number + 1}: {error}"


class Corpus:
    """The documents of some text files, numbered from 0 through the files in sorted order.

    Small and picklable: it holds offsets, not text.
    """

    def __init__(self, files: Sequence[TextFile], text_field: str, separator: str | None) -> None:
        self.files = tuple(files)
        self.text_field = text_field
        self.separator = separator
        self._starts = np.cumsum([0, *(f.documents for f in files)])

    @classmethod
    def scan(cls, uris: Sequence[str], text_field: str = "text", separator: str | None = None) -> Corpus:
        """Read every file once: count and index its documents, hash its bytes.

        Args:
            uris: .jsonl and .txt files, globs or folders; local paths or fsspec URIs.
            text_field: the field of a jsonl record that holds its text.
            separator: what stands between documents of a .txt file; None takes ``<|endoftext|>`` where the
                file has one, else blank lines.

        Raises:
            UserError: a missing file, a file of another kind, or no document that has text.
        """
        if separator == "":
            raise UserError("text_separator: give at least one character")
        found = sorted({file for uri in uris for file in _text_files(absolute(uri))})
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            files = list(pool.map(lambda uri: scan_file(uri, text_field, separator), found))
        corpus = cls(files, text_field, separator)
        if all(f.documents == f.blank for f in files):
            raise UserError(f"text: {', '.join(map(str, uris)) or 'nothing'}: no document holds any text")
        return corpus

    @property
    def n_documents(self) -> int:
        """All documents, blank and failed ones too."""
        return int(self._starts[-1])

    @property
    def hash(self) -> str:
        """SHA-256 over each file's name, size and content, and how documents are read from them."""
        files = [[f.uri.rsplit("/", 1)[-1], f.size, f.sha256] for f in self.files]
        return hash_json([files, self.text_field, self.separator])

    @property
    def problems(self) -> list[Document]:
        """Documents without text that the scan saw (it parses the first 16 MiB of each file)."""
        return [
            problem._replace(doc=int(start) + problem.doc)
            for start, file in zip(self._starts, self.files, strict=False)
            for problem in file.problems
        ]

    def read(self, first: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Documents ``first`` up to but without ``stop``, in order.

        Raises:
            UserError: a file is no longer what was scanned.
        """
        stop = self.n_documents if stop is None else min(stop, self.n_documents)
        for file, start in zip(self.files, self._starts.tolist(), strict=False):
            low, high = max(first - start, 0), min(stop - start, file.documents)
            if low < high:
                for number, raw in _pieces(file, low, high):
                    text, error = parse(raw, file.rule, self.text_field)
                    where = located(file.uri, file.rule, number, error) if error else None
                    yield Document(start + number, text, where)


def scan_file(uri: str, text_field: str = "text", separator: str | None = None) -> TextFile:
    """One pass over a file, in bounded memory."""
    digest, size = hashlib.sha256(), 0
    tallies = [_Tally(rule, uri, text_field) for rule in _rules(uri, separator)]
    try:
        for chunk in iter_chunks(uri):
            digest.update(chunk)
            size += len(chunk)
            for tally in tallies:
                tally.add(tally.splitter.feed(chunk))
            if tallies[0].documents and tallies[0].rule is MARKED:
                del tallies[1:]
    except PermissionError as e:
        raise UserError(f"text: {uri}: no permission to read it") from e
    marked = any(tally.documents for tally in tallies if tally.rule is MARKED)
    chosen = tallies[0] if marked else tallies[-1]
    chosen.add(chosen.splitter.finish())
    offsets = np.array(chosen.offsets, dtype=np.int64)
    problems = tuple(chosen.problems)
    return TextFile(
        uri, chosen.rule, size, digest.hexdigest(), chosen.documents, offsets, problems, chosen.blank
    )


def _rules(uri: str, separator: str | None) -> list[Format]:
    """The rules that may hold for a file, the first that finds a separator winning."""
    if uri.endswith(".jsonl"):
        return [LINES]
    return (
        [separated_by(separator)]
        if separator and separator != END_OF_TEXT
        else ([MARKED] if separator else [MARKED, PARAGRAPHS])
    )


def _text_files(uri: str) -> list[str]:
    found = list_files(uri)
    if found == [uri] and not uri.endswith(SUFFIXES):
        raise UserError(f"text: {uri}: only {' and '.join(SUFFIXES)} files are read")
    kept = [file for file in found if file.endswith(SUFFIXES)]
    if not kept:
        raise UserError(f"text: {uri}: no such file, or a folder without {' or '.join(SUFFIXES)} files")
    return kept


def _pieces(file: TextFile, low: int, high: int) -> Iterator[tuple[int, bytes]]:
    """Documents ``low`` up to ``high`` of a file as (number, bytes)."""
    number = low // STRIDE * STRIDE
    offset = int(file.offsets[low // STRIDE])
    last = high // STRIDE + 1
    end = int(file.offsets[last]) if last < len(file.offsets) else file.size
    splitter = Splitter(file.rule, offset)
    for chunk in [*iter_chunks(file.uri, offset, end), None]:
        for _, raw in splitter.finish() if chunk is None else splitter.feed(chunk):
            if number >= low:
                yield number, raw
            number += 1
            if number == high:
                return
    raise UserError(f"text: {file.uri} has changed since it was scanned; run again once it is settled")
