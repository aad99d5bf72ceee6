"""Text files as one numbered sequence of documents, read from any place without reading what is before."""

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
    """The documents of some text files, numbered from 0 through the files in sorted order.

    Small and picklable: it holds offsets, not text. May be read from several threads at once. .jsonl, .txt and
    .parquet are read from any place; .csv, .arrow and what is compressed only onwards, so that reading them in
    rising order is cheap (a process keeps the last 8 places open) and going back costs decoding from the start.
    """

    def __init__(self, files: Sequence[TextFile], text_field: str, separator: str | None) -> None:
        self.files = tuple(files)
        self.text_field = text_field
        self.separator = separator
        self._starts = np.cumsum([0, *(f.documents for f in files)])

    @classmethod
    def scan(cls, uris: Sequence[str], text_field: str = "text", separator: str | None = None) -> Corpus:
        """Read every file once: count and index its documents, hash its bytes (parquet: the footer's only).

        Args:
            uris: files, globs or folders; local paths or fsspec URIs, ``hf://`` too. A folder or glob gives all
                .jsonl, .txt, .csv (each also .gz or .zst), .parquet and .arrow files below it: every split of
                a saved ``DatasetDict``, for one.
            text_field: the field or column that holds a record's text; a record without it may hold a chat in
                ``messages``.
            separator: what stands between documents of a .txt file; None takes ``<|endoftext|>`` where the
                file has one, else blank lines.

        Raises:
            UserError: a missing or damaged file, a file of another kind, or no document that has text.
        """
        if separator == "":
            raise UserError("text_separator: give at least one character")
        found = text_files(uris)
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
        """SHA-256 over each file's name, size and content, and how documents are read from them.

        A file's content counts by the SHA-256 of its bytes, that of parquet by its footer's.
        """
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
                for number, content in CURSORS.read(file, low, high):
                    yield file.document(number, content, start)
