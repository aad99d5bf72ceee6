"""The configuration of ``dmm extract``."""

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
    """The language model, and how its weights are placed."""

    model: str
    """Language model: a Hugging Face folder, a .gguf file or a hub id."""
    device_map: str | None = None
    """How transformers distributes a large model over an actor's devices, e.g. auto; requires dmm-ray[large]."""
    max_memory: dict[str, str] | None = None
    """Maximum memory per device with device_map, e.g. {"0": "70GiB", "cpu": "100GiB"}."""
    offload_folder: str | None = None
    """Folder for weights that do not fit on any device with device_map."""


class ExtractConfig(Config):
    """Run a language model on text, up to the highest requested layer, and store the outputs of its blocks."""

    subject: ExtractedModel
    """The language model, and how its weights are placed."""
    text: str | list[str]
    """Text to read: .jsonl, .txt, .csv (each also .gz or .zst), .parquet, .arrow; files, globs or folders, local
    paths or fsspec URIs (s3://bucket/folder, hf://datasets/owner/name); one or a list."""
    layers: list[int] = Field(min_length=1)
    """Layers to extract: k is the output of decoder block k, counted from 0."""
    out: str
    """Folder of the store to write or resume; a local path or fsspec URI."""

    dtype: DtypeName = "bfloat16"
    """Stored number format."""
    compute_dtype: PrecisionOption = "auto"
    """Number format of the model's computation. auto is float32 if float32 is stored, else bfloat16 if the actors'
    devices are fast in it, else float32; a resumed store keeps its format."""
    window: int | None = Field(default=None, ge=2)
    """Maximum sequence length in tokens; defaults to 2048 or the model's context, whichever is smaller."""
    text_field: str = "text"
    """Field of a record that contains its text; a record without it may have chat `messages`."""
    text_separator: str | None = None
    """Separator between the documents of a .txt file; defaults to <|endoftext|> if it occurs, else blank lines."""
    max_failed_documents: int = Field(default=0, ge=0)
    """Number of failed documents (bad JSON, missing field, bad UTF-8, failed forward pass) to skip and list before
    giving up."""
    exclude: tuple[Excluded, ...] = ()
    """Rows to exclude: `nonfinite` (contains NaN or Inf), `outliers` (norm over 10 times the median of the unit, as for
    attention sinks); by default they are counted and kept."""
    covariance: bool = False
    """Add each layer's covariance to the statistics; adds d x d numbers of 8 bytes per unit and layer."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Maximum rows per unit of work, which makes one shard per layer; defaults to shards of about 256 MB."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass; defaults to 2048 on a CPU and 16384 on a GPU."""
    seed: int = 0
    """Seed for drawing tokens with tokens_per_doc, and for the sample on which the plan is based."""
    kept: TokenSelection = TokenSelection()
    """Which tokens of a document are kept."""
    pool: ActorPool = ActorPool()
    """The processes that each hold the model."""

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, layers: list[int]) -> list[int]:
        if len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError("expected distinct block numbers from 0")
        return sorted(layers)

    @property
    def uris(self) -> list[str]:
        """``text`` as a list of absolute URIs."""
        return [absolute(uri) for uri in ([self.text] if isinstance(self.text, str) else self.text)]
