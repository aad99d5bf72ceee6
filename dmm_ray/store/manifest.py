"""The metadata of a store: ``manifest.json``, the record of each finished unit, and the file layout."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dmm_ray.config import Config, one_line
from dmm_ray.errors import UserError
from dmm_ray.files import hash_json, join, read_bytes, read_json, write_bytes
from dmm_ray.precision import Precision
from dmm_ray.store.moments import Moments
from dmm_ray.store.token_selection import TokenSelection

MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
RECORDS = "shards"
FORMAT_VERSION = 1
ROW_GROUP_ROWS = 4096
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DtypeName = Literal["bfloat16", "float32"]
Excluded = Literal["nonfinite", "outliers"]
"""Rows that may be excluded, from every layer if they qualify in any: rows that contain NaN or Inf, or whose norm is
over ``OUTLIER_NORM`` times the median of their unit."""
OUTLIER_NORM = 10.0


class ResolvedEntry(Config):
    """What else determines a row, as resolved when the model was loaded."""

    chat_template: str | None
    """SHA-256; None if the tokenizer has none."""
    code: dict[str, str]
    """SHA-256 by name of each Python file shipped with the model and executed (``trust_remote_code``)."""
    rope: dict[str, Any]
    """Settings of the rotary position embedding, including defaults."""
    tokenizer_files: dict[str, str]
    """SHA-256 by name of the files of a tokenizer written in Python."""
    versions: dict[str, str] = Field(default={})
    """Versions of the libraries that computed the rows; differences are logged, not refused."""

    def identity(self) -> dict[str, object]:
        """What must match for a resume, by part."""
        return {
            "chat template": self.chat_template,
            **{f"code, {name}": digest for name, digest in self.code.items()},
            **{f"setting {name}": value for name, value in self.rope.items()},
            **{f"tokenizer, {name}": digest for name, digest in self.tokenizer_files.items()},
        }


class SubjectEntry(Config):
    """The model that the activations come from."""

    id: str
    revision: str | None
    weights_hash: str
    files: dict[str, str]
    """SHA-256 of config.json and the weight files, from which ``weights_hash`` is computed."""
    block_path: str | None
    n_layers: int
    context: int
    resolved: ResolvedEntry | None = None
    """None in a store created before this was recorded."""

    @model_serializer(mode="wrap")
    def _as_recorded(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits ``resolved`` if unknown, so that entries written before it existed are reproduced exactly."""
        found: dict[str, Any] = handler(self)
        if self.resolved is None:
            found.pop("resolved", None)
        return found

    def parts(self, tokenizer_hash: str) -> dict[str, object]:
        """What must match for a resume, by part of the model, the most specific part first.

        Args:
            tokenizer_hash: hash of its tokenizer and chat template together.
        """
        if self.resolved is None:
            return {"model": [self.weights_hash, tokenizer_hash]}
        files = self.files or {"weights": self.weights_hash}
        parts = {**files, **self.resolved.identity(), "tokenizer": tokenizer_hash}
        return {f"model ({part})": value for part, value in parts.items()}


class CorpusEntry(Config):
    """The text that the activations were extracted from."""

    uris: tuple[str, ...]
    hash: str
    documents: int
    text_field: str
    separator: str | None


class Derivation(Config):
    """How a prior produced the rows of a store that are not a language model's own activations."""

    verb: Literal["score", "denoise", "encode", "sample"]
    prior: str
    """Location of the prior."""
    prior_hash: str
    """Hash of its configuration and weights."""
    activations: str | None
    """Location of the store whose rows were the input."""
    activations_hash: str | None
    """The ``config_hash`` of that store."""
    arguments: dict[str, Any]
    """Everything else that determines the results."""
    columns: dict[str, str] = Field(default={})
    """Columns that the shards have instead of ``activation``, with their meanings; empty for activations."""

    def identity(self) -> dict[str, object]:
        """What must match for a resume, by option."""
        return {
            "verb": self.verb,
            "prior": self.prior_hash,
            "activations": self.activations_hash,
            **self.arguments,
        }


class Manifest(Config):
    """``manifest.json``: everything that determines the contents of a store, written before the first shard."""

    version: int = FORMAT_VERSION
    subject: SubjectEntry
    tokenizer_hash: str
    layers: tuple[int, ...]
    hook: Literal["block_output"] = "block_output"
    dtype: DtypeName
    compute_dtype: Precision
    d: int
    corpus: CorpusEntry | None
    """None for rows that were drawn from a prior: they were extracted from no text."""
    window: int
    kept: TokenSelection
    exclude: tuple[Excluded, ...]
    covariance: bool
    seed: int
    documents_per_unit: int
    row_group_rows: int = ROW_GROUP_ROWS
    units: int
    derived: Derivation | None = None
    """Set in a store that was derived from another one, whose own provenance is in the other fields."""
    config_hash: str = ""

    def sealed(self) -> Manifest:
        """A copy with its ``config_hash`` set."""
        return self.model_copy(update={"config_hash": hash_json(self.identity())})

    def identity(self) -> dict[str, object]:
        """What must match for a resume, by option; the locations of the model and the text are not part of it."""
        extracted = {
            "version": self.version,
            **self.subject.parts(self.tokenizer_hash),
            "block_path": self.subject.block_path,
            # Empty strings, not missing keys, without a corpus: the hash of stores that earlier versions drew.
            "text": self.corpus.hash if self.corpus else "",
            "text_field": self.corpus.text_field if self.corpus else "",
            "text_separator": self.corpus.separator if self.corpus else None,
            "layers": list(self.layers),
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
            "window": self.window,
            **self.kept.model_dump(),
            "exclude": sorted(self.exclude),
            "covariance": self.covariance,
            "seed": self.seed,
            "rows_per_shard": f"{self.documents_per_unit} documents a unit",
        }
        derived = self.derived.identity() if self.derived else {}
        return {**derived, **{name: value for name, value in extracted.items() if name not in derived}}

    @model_validator(mode="before")
    @classmethod
    def _without_text(cls, values: Any) -> Any:
        """Earlier versions recorded an empty corpus for drawn rows."""
        if (
            isinstance(values, dict)
            and isinstance(corpus := values.get("corpus"), dict)
            and not corpus.get("uris")
        ):
            return {**values, "corpus": None}
        return values

    @property
    def documents(self) -> int:
        """What units are cut from: documents of the corpus, or drawn rows, each of which counts as one."""
        if self.corpus is not None:
            return self.corpus.documents
        assert self.derived is not None
        return int(self.derived.arguments["n"])

    @property
    def text(self) -> CorpusEntry:
        """The text that the rows were extracted from. Raises UserError for rows that were drawn from a prior."""
        if self.corpus is None:
            raise UserError(
                "activations: rows that were drawn from a prior have no text; give an extracted store"
            )
        return self.corpus

    @property
    def verb(self) -> str:
        """The command that writes the store."""
        return self.derived.verb if self.derived else "extract"

    @property
    def is_table(self) -> bool:
        """Whether the shards have columns other than activations; such a store has no moments."""
        return self.derived is not None and bool(self.derived.columns)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The stored dtype."""
        return DTYPES[self.dtype]

    @property
    def bytes_per_row(self) -> int:
        """Width of the ``activation`` column."""
        return self.d * self.torch_dtype.itemsize


class FileEntry(Config):
    """One file of a unit."""

    bytes: int
    sha256: str


class Record(Config):
    """``shards/NNNNNN.json``: one finished unit, written after all its files."""

    config_hash: str
    """Hash of the manifest under which it was extracted."""
    unit: int
    first_document: int
    documents: int
    failed: tuple[tuple[int, str], ...]
    """Documents that have no text or whose forward pass failed: number and reason."""
    long: int
    """Documents longer than the window, which were truncated or split."""
    tokens: int
    """Tokens run through the model."""
    padding: int
    """Padding tokens run in addition."""
    rows: int
    excluded: int
    """Rows dropped by ``exclude``."""
    nonfinite: dict[str, int]
    """Rows that contain NaN or Inf, by layer, before exclusion; the moments never include them."""
    outliers: dict[str, int]
    """Rows with a norm over ``OUTLIER_NORM`` times the unit's median, by layer, before exclusion."""
    files: dict[str, FileEntry]
    figures: dict[str, Any] = Field(default={})
    """For a unit of scores or features: statistics of its columns, from which the summary is computed."""


def layer_folder(layer: int) -> str:
    """A layer's folder inside the store, such as ``layer_07``."""
    return f"layer_{layer:02d}"


def shard_name(layer: int, unit: int) -> str:
    """A shard's path inside the store."""
    return f"{layer_folder(layer)}/shard-{unit:06d}.parquet"


def record_name(unit: int) -> str:
    """A record's path inside the store."""
    return f"{RECORDS}/{unit:06d}.json"


def moments_name(unit: int) -> str:
    """The path of a unit's moments inside the store."""
    return f"{RECORDS}/{unit:06d}.safetensors"


def read_manifest(uri: str) -> Manifest:
    """The manifest of the store at ``uri``. Raises UserError if there is none that this version can read."""
    path = join(uri, MANIFEST)
    try:
        value = read_json(path)
    except UserError as e:
        if "no such file" in str(e):
            raise UserError(
                f"{uri}: not an activation store (no {MANIFEST}); create one with `dmm extract`"
            ) from e
        raise
    if isinstance(value, dict) and value.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {value['version']}; this dmm-ray reads version {FORMAT_VERSION}"
        )
    try:
        return Manifest.model_validate(value)
    except ValidationError as e:
        raise UserError(f"{path}: not a valid dmm-ray manifest: {one_line(e)}") from e


def read_record(uri: str, unit: int) -> Record:
    """The record of a unit. Raises UserError if it is missing or damaged."""
    path = join(uri, record_name(unit))
    try:
        return Record.model_validate_json(read_bytes(path))
    except ValidationError as e:
        raise UserError(f"{path}: not a valid dmm-ray record: {one_line(e)}") from e


def read_moments(uri: str, name: str, layers: tuple[int, ...]) -> dict[int, Moments]:
    """The moments by layer from a safetensors file of the store. Raises UserError if it is damaged."""
    path = join(uri, name)
    try:
        arrays = load(read_bytes(path))
        return {layer: Moments.from_arrays(arrays, layer_folder(layer)) for layer in layers}
    except (SafetensorError, KeyError) as e:
        raise UserError(f"{path}: damaged ({e}); delete it and run the same `dmm extract` again") from e


def write_moments(uri: str, name: str, moments: dict[int, Moments]) -> FileEntry:
    """Write moments by layer as safetensors under ``name`` in the store."""
    data: bytes = save(
        {k: v for layer, m in moments.items() for k, v in m.arrays(layer_folder(layer)).items()}
    )
    write_bytes(join(uri, name), data)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
