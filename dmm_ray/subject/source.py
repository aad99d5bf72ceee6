"""A subject model before its weights are loaded: where it is, what it is, its hashes, its tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import logging as hf_logging

from dmm_ray.errors import UserError
from dmm_ray.files import hash_json, sha256
from dmm_ray.subject.blocks import find_blocks

DEFAULT_CONTEXT = 2048
"""Context of a model whose configuration states none."""

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
_UNWANTED = ["original/*", "consolidated*", "*/*.safetensors"]


@dataclass(frozen=True)
class SubjectSource:
    """A model folder, found or downloaded, with its configuration but not its weights."""

    model_id: str
    """What the user asked for: an absolute folder or a hub id."""
    folder: Path
    revision: str | None
    """The resolved hub commit; None for a local folder."""
    config: Any
    trust_remote_code: bool = False

    @classmethod
    def resolve(
        cls, model: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> SubjectSource:
        """Find ``model``: a local folder, or a hub id that is fetched at ``revision`` into the hub's cache.

        Raises:
            UserError: neither a folder nor reachable on the hub, or a folder without a readable config.json.
        """
        local = Path(model).expanduser()
        if local.is_dir():
            folder, model_id, commit = local.absolute(), str(local.absolute()), None
        elif local.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise UserError(f"model: no folder at {model}; give a folder that holds config.json, or a hub id")
        else:
            folder, model_id = _download(model, revision), model
            commit = folder.name
        if not (folder / "config.json").is_file():
            raise UserError(f"model: {model} is not a model folder: it has no config.json")
        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(
                f"model: {model}: config.json is not one transformers can load ({first_line(e)})"
            ) from e
        return cls(model_id, folder, commit, config, trust_remote_code)

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def context(self) -> int:
        """The most tokens the model was made for."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over config.json and the weight files (safetensors where there are any), by sorted name."""
        files = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin"))
        if not files:
            raise UserError(f"model: {self.model_id} holds no weights (*.safetensors)")
        return hash_json({f.name: sha256(str(f)) for f in [self.folder / "config.json", *files]})

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError where the folder has none."""
        try:
            with quiet():
                return transformers.AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code
                )
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UserError(f"model: {self.model_id} has no tokenizer that loads ({first_line(e)})") from e

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of all that decides how text becomes tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return hashlib.sha256(backend.to_str().encode()).hexdigest()
        return hash_json([type(self.tokenizer).__name__, self.tokenizer.get_vocab()])

    def check(self, layers: Sequence[int], block_path: str | None = None) -> int:
        """Check without loading weights that blocks ``layers`` exist; the number of blocks.

        Raises:
            UserError: not a causal language model, unknown architecture, or a layer it lacks.
        """
        with quiet(), torch.device("meta"), self.loading():
            skeleton = transformers.AutoModelForCausalLM.from_config(
                self.config, trust_remote_code=self.trust_remote_code
            )
        n_layers = len(find_blocks(skeleton, block_path))
        check_layers(layers, n_layers, self.model_id)
        return n_layers

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Turn transformers' refusals of this model into a UserError."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            kind = getattr(self.config, "model_type", "unknown")
            raise UserError(
                f"model: {self.model_id} ({kind}) does not load as a causal language model ({first_line(e)})"
            ) from e


def check_layers(layers: Sequence[int], n_layers: int, model: str) -> None:
    """Raise UserError for a layer outside 0 .. n_layers - 1."""
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise UserError(f"layers: {model} has no layer {layer}; choose from 0 to {n_layers - 1}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _download(model: str, revision: str | None) -> Path:
    """The folder of a hub model's snapshot, its name being the commit."""
    try:
        found = Path(
            snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
        if not any(found.glob("*.safetensors")):
            snapshot_download(model, revision=revision, allow_patterns=["*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise UserError(
            f"model: {model} is neither a folder here nor a model the hub gives{offline}; "
            f"give a folder that holds config.json, or a hub id you may read ({type(e).__name__})"
        ) from e
    return found
