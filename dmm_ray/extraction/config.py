"""What ``dmm extract`` is told."""

from __future__ import annotations

from pydantic import Field, field_validator

from dmm_ray.config import Config
from dmm_ray.files import absolute
from dmm_ray.precision import PrecisionOption
from dmm_ray.store.manifest import DtypeName, Excluded
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.subject.config import ModelSource
from dmm_ray.units.resources import ActorPool


class ExtractedModel(ModelSource):
    """The language model, and where its weights go."""

    model: str
    """Language model: a Hugging Face folder, a .gguf file or a hub id."""
    device_map: str | None = None
    """How transformers spreads a large model over the devices of an actor, e.g. auto; needs dmm-ray[large]."""
    max_memory: dict[str, str] | None = None
    """Most memory to use of each device with device_map, e.g. {"0": "70GiB", "cpu": "100GiB"}."""
    offload_folder: str | None = None
    """Folder for weights that fit on no device with device_map."""


class ExtractConfig(Config):
    """Read text, run a language model up to the highest wanted layer, store what its blocks put out."""

    subject: ExtractedModel
    """The language model, and where its weights go."""
    text: str | list[str]
    """Text to read: .jsonl, .txt, .csv (each also .gz or .zst), .parquet, .arrow; files, globs or folders, local
    paths or fsspec URIs (s3://bucket/folder, hf://datasets/owner/name); one or a list."""
    layers: list[int] = Field(min_length=1)
    """Layers to keep: k is the output of decoder block k, counted from 0."""
    out: str
    """Folder of the store to write or to resume; a local path or fsspec URI."""

    dtype: DtypeName = "bfloat16"
    """Stored number format."""
    compute_dtype: PrecisionOption = "auto"
    """Number format of the model's computation. auto is float32 where float32 is stored, else bfloat16 where the
    actors' devices are fast in it and float32 elsewhere; a resumed store keeps what was chosen."""
    window: int | None = Field(default=None, ge=2)
    """Most tokens that go through the model together; by default 2048 or the model's context if less."""
    text_field: str = "text"
    """Field of a record that holds its text; a record without it may have chat `messages`."""
    text_separator: str | None = None
    """What parts the documents of a .txt file; by default <|endoftext|> if it occurs, else blank lines."""
    max_failed_documents: int = Field(default=0, ge=0)
    """Documents without text (bad JSON, no field, bad UTF-8) or whose forward pass fails, to skip and list before
    giving up."""
    exclude: tuple[Excluded, ...] = ()
    """Rows to leave out: `nonfinite` (a value that is not finite), `outliers` (a norm over 10 times their unit's
    median, as attention sinks have); by default they are counted and kept."""
    covariance: bool = False
    """Add each layer's covariance to the statistics; a unit then holds d x d numbers of 8 bytes more."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Most rows of a unit of work, whose rows of one layer make one shard; by default shards of about 256 MB."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass; by default 2048 on a CPU, 16384 on a GPU."""
    seed: int = 0
    """Of the tokens drawn with tokens_per_doc, and of the sample that the plan is made from."""
    kept: TokenSelection = TokenSelection()
    """Which tokens of a document are kept."""
    pool: ActorPool = ActorPool()
    """The processes that each hold the model."""

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, layers: list[int]) -> list[int]:
        if len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError("give distinct block numbers from 0 up")
        return sorted(layers)

    @property
    def uris(self) -> list[str]:
        """``text`` as a list of absolute URIs."""
        return [absolute(uri) for uri in ([self.text] if isinstance(self.text, str) else self.text)]
