"""Text files as one numbered sequence of documents, readable from any point without reading what precedes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dmm_ray.errors import UserError
from dmm_ray.files import hash_json
from dmm_ray.text.documents import Document
from dmm_ray.text.formats.base import TextFile
from dmm_ray.text.formats.cursors import CURSORS
from dmm_ray.text.formats.registry import scan_file, text_files

SCAN_THREADS = 8


class Corpus:
    """The documents of a set of text files, numbered from 0 across the files in sorted order.

    Small and picklable: it holds offsets, not text. Safe to read from several threads at once. .jsonl, .txt and
    .parquet support random access; .csv, .arrow and compressed files only sequential access, so that reading them
    in increasing order is cheap (a process keeps the last 8 cursors open) and going back means decoding from the
    start.
    """

    def __init__(self, files: Sequence[TextFile], text_field: str, separator: str | None) -> None:
        self.files = tuple(files)
        self.text_field = text_field
        self.separator = separator
        self._starts = np.cumsum([0, *(f.documents for f in files)])

    @classmethod
    def scan(cls, uris: Sequence[str], text_field: str = "text", separator: str | None = None) -> Corpus:
        """Read every file once: count and index its documents, and hash its bytes (for parquet, only the footer).

        Args:
            uris: files, globs or folders; local paths or fsspec URIs, ``hf://`` too. A folder or glob stands
                for all .jsonl, .txt, .csv (each also .gz or .zst), .parquet and .arrow files below it, including
                every split of a saved ``DatasetDict``.
            text_field: the field or column with a record's text; a record without it may have a chat in ``messages``.
            separator: the separator between documents of a .txt file; None uses ``<|endoftext|>`` if the file contains
                it, else blank lines.

        Raises:
            UserError: a file is missing, damaged or unsupported, or no document has text.
        """
        if separator == "":
            raise UserError("text_separator: expected at least one character")
        found = text_files(uris)
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            files = list(pool.map(lambda uri: scan_file(uri, text_field, separator), found))
        corpus = cls(files, text_field, separator)
        if all(f.documents == f.blank for f in files):
            raise UserError(f"text: {', '.join(map(str, uris)) or 'nothing'}: no document contains any text")
        return corpus

    @property
    def n_documents(self) -> int:
        """Number of documents, including blank and failed ones."""
        return int(self._starts[-1])

    @property
    def hash(self) -> str:
        """SHA-256 over each file's name, size and content hash, and the options that determine how documents are read.

        The content hash is the SHA-256 of the file's bytes or, for parquet, of its footer.
        """
        files = [[f.uri.rsplit("/", 1)[-1], f.size, f.sha256] for f in self.files]
        return hash_json([files, self.text_field, self.separator])

    @property
    def problems(self) -> list[Document]:
        """Documents without text found by the scan, which parses the first 16 MiB of each file."""
        return [
            problem._replace(doc=int(start) + problem.doc)
            for start, file in zip(self._starts, self.files, strict=False)
            for problem in file.problems
        ]

    def read(self, first: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Documents ``first`` up to but excluding ``stop``, in order.

        Raises:
            UserError: a file has changed since the scan.
        """
        stop = self.n_documents if stop is None else min(stop, self.n_documents)
        for file, start in zip(self.files, self._starts.tolist(), strict=False):
            low, high = max(first - start, 0), min(stop - start, file.documents)
            if low < high:
                for number, content in CURSORS.read(file, low, high):
                    yield file.document(number, content, start)
