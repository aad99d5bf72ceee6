"""Selects text files by suffix, and the scanner for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

from dmm_ray.errors import UserError
from dmm_ray.files import MAGIC, absolute, exists, join, list_with_broken_links, match_files, read_json
from dmm_ray.provenance import SUMMARY
from dmm_ray.text.formats.base import TextFile
from dmm_ray.text.formats.csv_rows import CsvRows
from dmm_ray.text.formats.delimited import Delimited, scan_txt
from dmm_ray.text.formats.splitting import LINES
from dmm_ray.text.formats.streams import CODECS
from dmm_ray.text.formats.tables import ArrowRows, ParquetRows

STREAMED = (".jsonl", ".ndjson", ".txt", ".csv")
PLAIN_OR_PACKED = map("".join, product(STREAMED, ["", *CODECS]))
SUFFIXES = (*PLAIN_OR_PACKED, *(".json" + codec for codec in CODECS), ".parquet", ".arrow")
"""Suffixes of text files. Compressed ``.json`` is JSON Lines, as in hub datasets; plain ``.json`` may be anything."""
NOT_DATA = ("cache-", "indices")
"""Name prefixes of Arrow files next to a Hugging Face dataset's data: cached results and row indices."""
OURS = {
    "manifest.json": {"config_hash", "documents_per_unit"},
    "train.json": {"train", "prior"},
    SUMMARY: {"inputs", "versions", "seconds"},
}
"""Files found in dmm-ray's own output folders, and the keys that identify them as such."""
NAMED_FILES = 5
"""Number of skipped files named in the log."""
logger = logging.getLogger(__name__)


def text_files(uris: Sequence[str]) -> list[str]:
    """The text files that ``uris`` refer to, each once, in sorted order.

    A URI that exists is a file or folder; otherwise it is a pattern. A folder or pattern stands for every file with a
    known suffix (in any case), except names that begin with ``.`` or ``_`` and dmm-ray's own output; skipped files are
    logged in one line. In a folder saved by ``datasets`` (it has a ``state.json``), only the Arrow files listed there
    are data; elsewhere, all except ``cache-*`` and ``indices*``.

    Raises:
        UserError: there are none, or the type of a file given by name is unknown.
    """
    return sorted({file for uri in uris for file in _files_of(absolute(uri))})


def scan_file(uri: str, text_field: str = "text", separator: str | None = None) -> TextFile:
    """Read a file once: count and index its documents, and hash its bytes (for parquet, only the footer).

    Raises:
        UserError: the file is missing, damaged or of an unknown type.
    """
    suffix = _suffix(uri)
    name, _, ending = suffix[1:].partition(".")
    codec = CODECS.get("." + ending)
    if name == "txt":
        return scan_txt(uri, text_field, codec, separator)
    if name in ("jsonl", "ndjson", "json"):
        return Delimited(text_field, LINES, codec).scan(uri)
    if name == "csv":
        return CsvRows(text_field, codec).scan(uri)
    return (ParquetRows if name == "parquet" else ArrowRows)(text_field).scan(uri)


def _suffix(uri: str) -> str:
    found = next((suffix for suffix in SUFFIXES if uri.lower().endswith(suffix)), None)
    if found is None:
        raise UserError(f"text: {uri}: unknown file type; supported suffixes are {', '.join(SUFFIXES)}")
    return found


def _files_of(uri: str) -> list[str]:
    there, broken = list_with_broken_links(uri)
    if there == [uri]:
        _suffix(uri)
        return there
    found = [*there, *broken] or match_files(uri)
    folder, asked = _split_pattern(uri)
    shown = [file for file in found if _hidden(asked) or not _hidden(_below(file, folder))]
    ours = _own_folders(shown)
    text = [file for file in shown if file.lower().endswith(SUFFIXES) and not file.startswith(ours)]
    kept = _without_caches([file for file in text if file not in broken])
    left_out = sorted(set(found) - set(kept), key=lambda file: (_hidden(_below(file, folder)), file))
    if left_out and kept:
        names = ", ".join(_below(file, folder).lstrip("/") for file in left_out[:NAMED_FILES])
        more = f" and {len(left_out) - NAMED_FILES} more" if len(left_out) > NAMED_FILES else ""
        logger.info(
            "text: %s: reading %d files, skipping %d (other types, hidden, broken links, dmm-ray's own output): %s%s",
            uri, len(kept), len(left_out), names, more,
        )  # fmt: skip
    if not kept:
        own = "; dmm-ray's own output is not read as text" if ours else ""
        raise UserError(f"text: {uri}: no such file, or a folder without any of {', '.join(SUFFIXES)}{own}")
    return kept


def _split_pattern(uri: str) -> tuple[str, str]:
    """The folder that a pattern begins with, and the rest; for a folder, its path and an empty string."""
    first = min((uri.index(c) for c in MAGIC if c in uri), default=len(uri))
    if first == len(uri) or exists(uri):
        return uri, ""
    folder, _, _ = uri[:first].rpartition("/")
    return folder, uri.removeprefix(folder)


def _below(file: str, folder: str) -> str:
    """The path of ``file`` relative to ``folder``, ignoring protocols: a file system with several reports only one."""
    paths = [uri.partition("://")[2] or uri for uri in (file, folder)]
    return paths[0].removeprefix(paths[1])


def _hidden(below: str) -> bool:
    """Whether a relative path has a part that is hidden (``.``) or internal (``_``, such as a table format's logs)."""
    return any(part.startswith((".", "_")) for part in below.split("/") if part)


def _own_folders(files: Sequence[str]) -> tuple[str, ...]:
    """The folders of ``files`` that contain a store, run or report written by dmm-ray."""
    return tuple(
        file.removesuffix(name)
        for file in files
        if (name := file.rpartition("/")[2]) in OURS and _has_keys(file, OURS[name])
    )


def _has_keys(uri: str, keys: set[str]) -> bool:
    try:
        value = read_json(uri)
    except UserError:  # not JSON, so not ours
        return False
    return isinstance(value, dict) and keys <= set(value)


def _without_caches(files: list[str]) -> list[str]:
    folders = {file.rpartition("/")[0] for file in files if file.endswith(".arrow")}
    saved = {folder: _saved_names(folder) for folder in folders}
    return [file for file in files if not file.endswith(".arrow") or _is_data(file, saved)]


def _is_data(file: str, saved: dict[str, set[str] | None]) -> bool:
    folder, _, name = file.rpartition("/")
    names = saved[folder]
    return not name.startswith(NOT_DATA) if names is None else name in names


def _saved_names(folder: str) -> set[str] | None:
    """The data files of the dataset saved in ``folder``; None if there is no saved dataset."""
    uri = join(folder, "state.json")
    if not exists(uri):
        return None
    state: Any = read_json(uri)
    try:
        return {str(entry["filename"]) for entry in state["_data_files"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"text: {uri}: lists no _data_files; give the .arrow files themselves") from e
