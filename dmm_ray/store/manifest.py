"""What a store holds: ``manifest.json``, the record of each finished unit, and where files are."""

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
"""Rows that can be excluded, from all layers if they qualify in one: rows that contain NaN or Inf, or whose norm is
over ``OUTLIER_NORM`` times the median of their unit."""
OUTLIER_NORM = 10.0


class ResolvedEntry(Config):
    """What else determines a row, recorded after the model was loaded."""

    chat_template: str | None
    """SHA-256; None for a tokenizer without one."""
    code: dict[str, str]
    """SHA-256 of each Python file that came with the model and ran (``trust_remote_code``), by name."""
    rope: dict[str, Any]
    """Settings of the rotary position embedding, defaults included."""
    tokenizer_files: dict[str, str]
    """SHA-256 of the files of a tokenizer that is written in Python, by name."""
    versions: dict[str, str] = Field(default={})
    """Of the libraries that computed the rows: said where they differ, not refused."""

    def identity(self) -> dict[str, object]:
        """What a resume must have alike, by part."""
        return {
            "chat template": self.chat_template,
            **{f"code, {name}": digest for name, digest in self.code.items()},
            **{f"setting {name}": value for name, value in self.rope.items()},
            **{f"tokenizer, {name}": digest for name, digest in self.tokenizer_files.items()},
        }


class SubjectEntry(Config):
    """The model whose activations these are."""

    id: str
    revision: str | None
    weights_hash: str
    files: dict[str, str]
    """SHA-256 of config.json and the weight files, which ``weights_hash`` is made of."""
    block_path: str | None
    n_layers: int
    context: int
    resolved: ResolvedEntry | None = None
    """None in a store that was begun before this was recorded."""

    @model_serializer(mode="wrap")
    def _as_recorded(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``resolved`` where it is not known: such an entry, and all that holds it, stays as it was."""
        found: dict[str, Any] = handler(self)
        if self.resolved is None:
            found.pop("resolved", None)
        return found

    def parts(self, tokenizer_hash: str) -> dict[str, object]:
        """What a resume must have alike, by part of the model, the most particular part first.

        Args:
            tokenizer_hash: of its tokenizer and chat template together.
        """
        if self.resolved is None:
            return {"model": [self.weights_hash, tokenizer_hash]}
        files = self.files or {"weights": self.weights_hash}
        parts = {**files, **self.resolved.identity(), "tokenizer": tokenizer_hash}
        return {f"model ({part})": value for part, value in parts.items()}


class CorpusEntry(Config):
    """The text they were extracted from."""

    uris: tuple[str, ...]
    hash: str
    documents: int
    text_field: str
    separator: str | None


class Derivation(Config):
    """How the rows of a store were made by a prior, where a language model did not put them out."""

    verb: Literal["score", "denoise", "encode", "sample"]
    prior: str
    """Where the prior was."""
    prior_hash: str
    """Of its configuration and weights."""
    activations: str | None
    """Where the rows were that they were made from."""
    activations_hash: str | None
    """The ``config_hash`` of that store."""
    arguments: dict[str, Any]
    """All else that decides the numbers."""
    columns: dict[str, str] = Field(default={})
    """What the shards hold in place of ``activation``, if that is so: columns and what they mean."""

    def identity(self) -> dict[str, object]:
        """What a resume must have alike, by option."""
        return {
            "verb": self.verb,
            "prior": self.prior_hash,
            "activations": self.activations_hash,
            **self.arguments,
        }


class Manifest(Config):
    """``manifest.json``: all that decides what a store holds, written before the first shard."""

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
    """Of a store that was made from another one; what the other one was made from stands beside it."""
    config_hash: str = ""

    def sealed(self) -> Manifest:
        """The same with its ``config_hash``."""
        return self.model_copy(update={"config_hash": hash_json(self.identity())})

    def identity(self) -> dict[str, object]:
        """What a resume must have alike, by option; where the model and the text lie is not part of it."""
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
        """Whether the shards hold other columns than activations; there are no moments then."""
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
    """Of the manifest that it was extracted under."""
    unit: int
    first_document: int
    documents: int
    failed: tuple[tuple[int, str], ...]
    """Documents without text or whose forward pass failed: number and reason."""
    long: int
    """Documents longer than the window, cut or split there."""
    tokens: int
    """Tokens that went through the model."""
    padding: int
    """Padding tokens that went through it beside them."""
    rows: int
    excluded: int
    """Rows left out by ``exclude``."""
    nonfinite: dict[str, int]
    """Rows that contain NaN or Inf, by layer, before exclusion; the moments leave them out."""
    outliers: dict[str, int]
    """Rows with a norm over ``OUTLIER_NORM`` times the unit's median, by layer, before any are left out."""
    files: dict[str, FileEntry]
    figures: dict[str, Any] = Field(default={})
    """Of the columns of a unit of scores or features: what the summary is made of."""


def layer_folder(layer: int) -> str:
    """``layer_07``."""
    return f"layer_{layer:02d}"


def shard_name(layer: int, unit: int) -> str:
    """A shard's path inside the store."""
    return f"{layer_folder(layer)}/shard-{unit:06d}.parquet"


def record_name(unit: int) -> str:
    """A record's path inside the store."""
    return f"{RECORDS}/{unit:06d}.json"


def moments_name(unit: int) -> str:
    """The path inside the store of a unit's moments."""
    return f"{RECORDS}/{unit:06d}.safetensors"


def read_manifest(uri: str) -> Manifest:
    """The manifest of the store at ``uri``. Raises UserError where there is none that this version reads."""
    path = join(uri, MANIFEST)
    try:
        value = read_json(path)
    except UserError as e:
        if "no such file" in str(e):
            raise UserError(f"{uri}: not an activation store (no {MANIFEST}); `dmm extract` makes one") from e
        raise
    if isinstance(value, dict) and value.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise UserError(f"{path}: format version {value['version']}; this dmm-ray reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as e:
        raise UserError(f"{path}: not a manifest of ours: {one_line(e)}") from e


def read_record(uri: str, unit: int) -> Record:
    """A unit's record. Raises UserError if it is missing or damaged."""
    path = join(uri, record_name(unit))
    try:
        return Record.model_validate_json(read_bytes(path))
    except ValidationError as e:
        raise UserError(f"{path}: not a record of ours: {one_line(e)}") from e


def read_moments(uri: str, name: str, layers: tuple[int, ...]) -> dict[int, Moments]:
    """The moments by layer in a safetensors file of the store. Raises UserError if it is damaged."""
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
