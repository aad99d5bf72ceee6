"""Which files are text, and how each is scanned, by suffix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from dmm_ray.errors import UserError
from dmm_ray.files import absolute, exists, join, list_files, read_json
from dmm_ray.text.formats.base import TextFile
from dmm_ray.text.formats.csv_rows import CsvRows
from dmm_ray.text.formats.delimited import Delimited, scan_txt
from dmm_ray.text.formats.splitting import LINES
from dmm_ray.text.formats.streams import CODECS
from dmm_ray.text.formats.tables import ArrowRows, ParquetRows

STREAMED = (".jsonl", ".txt", ".csv")
PLAIN_OR_PACKED = map("".join, product(STREAMED, ["", *CODECS]))
SUFFIXES = (*PLAIN_OR_PACKED, *(".json" + codec for codec in CODECS), ".parquet", ".arrow")
"""Suffixes of text files. Compressed ``.json`` is JSON lines, as hub datasets have it; a plain one may be anything."""
NOT_DATA = ("cache-", "indices")
"""Arrow files of such names lie beside a Hugging Face dataset's data: cached results, orders of rows."""


def text_files(uris: Sequence[str]) -> list[str]:
    """The text files that ``uris`` name, once each, in sorted order.

    A folder or glob gives every file of a known suffix. Of the arrow files in a folder that ``datasets`` saved
    (it has a ``state.json``) only those that it names are data, elsewhere all but ``cache-*`` and ``indices*``.

    Raises:
        UserError: there is none, or a file given by name is of an unknown kind.
    """
    return sorted({file for uri in uris for file in _files_of(absolute(uri))})


def scan_file(uri: str, text_field: str = "text", separator: str | None = None) -> TextFile:
    """Read a file once: count and index its documents, hash its bytes (of parquet, its footer's).

    Raises:
        UserError: the file is missing, damaged or of an unknown kind.
    """
    suffix = _suffix(uri)
    name, _, ending = suffix[1:].partition(".")
    codec = CODECS.get("." + ending)
    if name == "txt":
        return scan_txt(uri, text_field, codec, separator)
    if name in ("jsonl", "json"):
        return Delimited(text_field, LINES, codec).scan(uri)
    if name == "csv":
        return CsvRows(text_field, codec).scan(uri)
    return (ParquetRows if name == "parquet" else ArrowRows)(text_field).scan(uri)


def _suffix(uri: str) -> str:
    found = next((suffix for suffix in SUFFIXES if uri.endswith(suffix)), None)
    if found is None:
        raise UserError(f"text: {uri}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    return found


def _files_of(uri: str) -> list[str]:
    found = list_files(uri)
    if found == [uri]:
        _suffix(uri)
        return found
    kept = _without_caches([file for file in found if file.endswith(SUFFIXES)])
    if not kept:
        raise UserError(f"text: {uri}: no such file, or a folder without any of {', '.join(SUFFIXES)}")
    return kept


def _without_caches(files: list[str]) -> list[str]:
    folders = {file.rpartition("/")[0] for file in files if file.endswith(".arrow")}
    saved = {folder: _saved_names(folder) for folder in folders}
    return [file for file in files if not file.endswith(".arrow") or _is_data(file, saved)]


def _is_data(file: str, saved: dict[str, set[str] | None]) -> bool:
    folder, _, name = file.rpartition("/")
    names = saved[folder]
    return not name.startswith(NOT_DATA) if names is None else name in names


def _saved_names(folder: str) -> set[str] | None:
    """The data files of a dataset saved in ``folder``; None where none is."""
    uri = join(folder, "state.json")
    if not exists(uri):
        return None
    state: Any = read_json(uri)
    try:
        return {str(entry["filename"]) for entry in state["_data_files"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"text: {uri}: names no _data_files; give the .arrow files themselves") from e
