"""A subject model before its weights are loaded: its folder, configuration, hashes and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from dmm_ray.errors import UserError
from dmm_ray.files import hash_json, sha256
from dmm_ray.subject.blocks import find_blocks, text_model
from dmm_ray.subject.gguf import is_gguf, unpack
from dmm_ray.subject.hub import download
from dmm_ray.subject.identity import code_hashes, rope_settings, tokenizer_file_hashes, tokenizer_hash
from dmm_ray.subject.loading import (
    LoadedModel,
    Placement,
    build_skeleton,
    is_bidirectional,
    is_quantized,
    load_blocks,
    load_head,
    position_offset,
)
from dmm_ray.subject.quiet import first_line, quiet

DEFAULT_CONTEXT = 2048
"""Context of a model whose configuration does not state one."""


@dataclass(frozen=True)
class SubjectSource:
    """A model folder, found or downloaded, with its configuration but not its weights."""

    model_id: str
    """The requested model: an absolute path or a hub id."""
    folder: Path
    revision: str | None
    """The resolved hub commit; None for a local folder."""
    config: Any
    trust_remote_code: bool = False
    gguf: dict[str, str] | None = None
    """Name and SHA-256 of the GGUF file that ``folder`` was unpacked from, if it was."""

    @classmethod
    def resolve(
        cls, model: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> SubjectSource:
        """Find ``model``: a local folder or GGUF file, or a hub id downloaded at ``revision`` into the hub cache.

        Raises:
            UserError: neither a local path nor reachable on the hub, there is no readable config.json, or a GGUF file
                cannot be unpacked.
        """
        local, packed = Path(model).expanduser(), None
        if is_gguf(local):
            model_id, commit = str(local.absolute()), None
            folder, digest = unpack(local.absolute())
            packed = {local.name: digest}
        elif local.is_dir():
            folder, model_id, commit = local.absolute(), str(local.absolute()), None
        # Report a missing path here, without asking the hub: a hub id has at most one slash.
        elif local.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise UserError(
                f"model: no folder at {model}; give a folder that contains config.json, a .gguf file or a hub id"
            )
        else:
            folder, model_id = download(model, revision), model
            commit = folder.name
        if not (folder / "config.json").is_file():
            raise UserError(f"model: {model} is not a model folder: it has no config.json")
        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, StrictDataclassError) as e:
            _refuse_remote_code(model, e)
            raise UserError(
                f"model: {model}: transformers cannot load its config.json ({first_line(e)})"
            ) from e
        if config.is_encoder_decoder:
            raise UserError(
                f"model: {model} ({config.model_type}) is an encoder-decoder; "
                "give a causal language model or an encoder"
            )
        return cls(model_id, folder, commit, config, trust_remote_code, packed)

    @cached_property
    def skeleton(self) -> Any:
        """The whole model, with its head if it has one, on the meta device: shapes without weights.

        Raises:
            UserError: transformers cannot build it.
        """
        with self.loading():
            return build_skeleton(self.config, self.trust_remote_code)

    @cached_property
    def bidirectional(self) -> bool:
        """Whether it is an encoder, whose tokens attend to later ones and which predicts no next tokens."""
        return is_bidirectional(self.skeleton)

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def context(self) -> int:
        """Context window of the model, in tokens."""
        text = self.config.get_text_config()
        for name in ("max_position_embeddings", "max_seq_len"):
            if stated := getattr(text, name, None):
                return int(stated) - position_offset(self.skeleton)
        return DEFAULT_CONTEXT

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the GGUF file, or of config.json and each weight file (safetensors if there are any), by name."""
        if self.gguf is not None:
            return self.gguf
        files = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin"))
        if not files:
            raise UserError(f"model: {self.model_id} contains no weights (*.safetensors)")
        return {f.name: sha256(str(f)) for f in [self.folder / "config.json", *files]}

    @property
    def weights_hash(self) -> str:
        """SHA-256 over ``file_hashes``."""
        return hash_json(self.file_hashes)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError if the folder has none."""
        try:
            with quiet():
                return transformers.AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code
                )
        except (OSError, ValueError, KeyError, ImportError) as e:
            _refuse_remote_code(self.model_id, e)
            raise UserError(
                f"model: {self.model_id} has no tokenizer that can be loaded ({first_line(e)})"
            ) from e

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of everything that determines how text, and chats if there is a chat template, become tokens."""
        return tokenizer_hash(self.tokenizer)

    @property
    def tokenizer_files(self) -> dict[str, str]:
        """SHA-256 by name of the files of a slow (Python) tokenizer; empty for fast ones."""
        return tokenizer_file_hashes(self.tokenizer, self.folder)

    @property
    def chat_template_hash(self) -> str | None:
        """SHA-256 of the chat template, or of all if there are several; None if there is none."""
        template = self.tokenizer.chat_template
        return hash_json(template) if template else None

    @cached_property
    def code_hashes(self) -> dict[str, str]:
        """SHA-256 by name of each Python file that came with the model and was loaded; empty unless code is trusted.

        Raises:
            UserError: as :attr:`skeleton` and :attr:`tokenizer`.
        """
        if not self.trust_remote_code:
            return {}
        configs = (self.config, self.config.get_text_config())
        parts = (*configs, self.tokenizer, *self.skeleton.modules())
        return code_hashes({type(part) for part in parts})

    @property
    def rope(self) -> dict[str, Any]:
        """Settings of the rotary position embedding, with the defaults that the configuration file leaves out."""
        return rope_settings(self.config.get_text_config())

    def check(self, layers: Sequence[int], block_path: str | None = None) -> int:
        """Check without loading weights that blocks ``layers`` exist; returns the number of blocks.

        Raises:
            UserError: not a language model, an unknown architecture, or it lacks a layer.
        """
        n_layers = len(text_model(self.skeleton).get_submodule(find_blocks(self.skeleton, block_path)))
        check_layers(layers, n_layers, self.model_id)
        return n_layers

    def load(
        self, path: str, n_blocks: int, *, head: bool, dtype: torch.dtype, placement: Placement
    ) -> LoadedModel:
        """The model with its weights, in evaluation mode, without gradients.

        Args:
            path: path of the blocks inside the text model (``find_blocks``).
            n_blocks: number of leading blocks to keep; without a head only.
            head: load the whole model with its head, not just its text model.
            dtype: dtype of the weights and the computation.
            placement: devices of the weights.

        Raises:
            UserError: its files lack weights or cannot be loaded.
        """
        with self.loading():
            spread = placement.spread(is_quantized(self.config))
            loaded = (
                load_head(self.folder, self.skeleton, dtype=dtype, **spread)
                if head
                else load_blocks(self.folder, self.skeleton, path, n_blocks, dtype=dtype, **spread)
            )
        if loaded.missing:
            raise UserError(
                f"model: the files of {self.model_id} lack {len(loaded.missing)} weights, "
                f"e.g. {loaded.missing[0]}"
            )
        if not spread:
            loaded.model.to(placement.device)
        return loaded

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Silence transformers and turn its errors with this model into a UserError."""
        try:
            with quiet():
                yield
        except UserError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
            _refuse_remote_code(self.model_id, e)
            kind = getattr(self.config, "model_type", "unknown")
            raise UserError(
                f"model: {self.model_id} ({kind}) does not load as a language model ({first_line(e)})"
            ) from e


def _refuse_remote_code(model: str, error: Exception) -> None:
    """Raise UserError if ``error`` is transformers' refusal to run code that comes with the model."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"model: {model} comes with its own Python code; if you trust it, pass --trust-remote-code"
        ) from error


def check_layers(layers: Sequence[int], n_layers: int, model: str) -> None:
    """Raise UserError for a layer outside 0 .. n_layers - 1."""
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise UserError(f"layers: {model} has no layer {layer}; choose from 0 to {n_layers - 1}")
