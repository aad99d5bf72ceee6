"""Common to all text file formats: blocks of documents, and a single pass that counts and checks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from dmm_ray.errors import UserError
from dmm_ray.text.documents import Content, Document
from dmm_ray.text.formats.streams import Hashed, length, opened

STRIDE = 64
"""The byte offset of every 64th document of an uncompressed file is kept."""
SCANNED_BYTES = 16 << 20
"""The scan parses this much of each file, so that a wrong field name or encoding is found before work starts."""
KEPT_PROBLEMS = 100


class RecordBlock(NamedTuple):
    """Consecutive documents that are read together and parsed individually on request."""

    raws: Sequence[Any]
    parse: Callable[[Any], Content]
    """Parses one of ``raws``."""
    n_bytes: int
    offsets: Sequence[int] = ()
    """Byte offset of each document, if reading may start there."""


@dataclass(frozen=True)
class TextFile:
    """The result of scanning one file."""

    uri: str
    source: Source
    size: int
    sha256: str
    documents: int
    starts: np.ndarray
    """int64: where reading may start, in the source's own units; empty if only at the beginning."""
    problems: tuple[Document, ...]
    """Documents without text among the first 16 MiB, numbered within the file; at most 100."""
    blank: int
    """Number of documents known to be blank."""

    def document(self, number: int, content: Content, first: int = 0) -> Document:
        """Document ``number`` of this file as number ``first + number`` of a corpus."""
        return _document(self.uri, self.source.unit, number, content)._replace(doc=first + number)


@dataclass(frozen=True)
class Source(ABC):
    """A file format and how to read its documents. Hashable and picklable."""

    text_field: str

    @property
    @abstractmethod
    def unit(self) -> str:
        """The name for a record in error messages: line, document or row."""

    @abstractmethod
    def blocks(self, file: BinaryIO, place: int = 0) -> Iterator[RecordBlock]:
        """The documents of ``file`` in order, starting from ``place``, as returned by the method ``place``."""

    def place(self, starts: np.ndarray, number: int) -> tuple[int, int]:
        """The last document up to ``number`` where reading may start, and the argument for ``blocks``."""
        return 0, 0

    def scan(self, uri: str) -> TextFile:
        """One pass over a file in bounded memory: count and index its documents, and hash its bytes.

        Raises:
            UserError: the file is missing or damaged.
        """
        with opened(uri) as raw:
            size = length(raw)
            file = Hashed(raw)
            tally = Tally(uri, self.unit)
            for block in self.blocks(cast(BinaryIO, file)):
                tally.add(block)
            return tally.found(self, size, file.sha256())


def read_blocks(file: TextFile, place: int) -> Generator[RecordBlock, None, None]:
    """The blocks of a scanned file, starting from ``place``.

    Raises:
        UserError: the file is missing, damaged, or its length has changed since the scan.
    """
    with opened(file.uri) as raw:
        if length(raw) != file.size:
            raise changed(file)
        yield from file.source.blocks(raw, place)


def changed(file: TextFile) -> UserError:
    """The error for a file that has changed since the scan."""
    return UserError(
        f"text: {file.uri} has changed since it was scanned; run again once it is no longer being modified"
    )


@dataclass
class Tally:
    """Counts the documents of one file and checks those of its first 16 MiB."""

    uri: str
    unit: str
    documents: int = 0
    blank: int = 0
    n_bytes: int = 0
    starts: list[int] = field(default_factory=list)
    problems: list[Document] = field(default_factory=list)

    def add(self, block: RecordBlock) -> None:
        """Add the next block."""
        if self.n_bytes < SCANNED_BYTES:
            self._check(block)
        self.starts += block.offsets[-self.documents % STRIDE :: STRIDE]
        self.documents += len(block.raws)
        self.n_bytes += block.n_bytes

    def found(self, source: Source, size: int, sha256: str) -> TextFile:
        """The result of the scan."""
        starts, problems = np.array(self.starts, dtype=np.int64), tuple(self.problems)
        return TextFile(self.uri, source, size, sha256, self.documents, starts, problems, self.blank)

    def _check(self, block: RecordBlock) -> None:
        for number, raw in enumerate(block.raws, self.documents):
            content = block.parse(raw)
            self.blank += content.is_blank
            if content.error and len(self.problems) < KEPT_PROBLEMS:
                self.problems.append(_document(self.uri, self.unit, number, content))


def _document(uri: str, unit: str, number: int, content: Content) -> Document:
    """A document of one file; an error names the file and the record, counted from 1."""
    error = content.error and f"{uri}: {unit} {number + 1}: {content.error}"
    return Document(number, content.text, error, content.messages)
