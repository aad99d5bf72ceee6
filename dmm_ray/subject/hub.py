"""Downloading a model from the Hugging Face hub, once for all processes on a machine."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dmm_ray.errors import UserError

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
_UNWANTED = ["original/*", "consolidated*", "*/*.safetensors"]


def download(model: str, revision: str | None) -> Path:
    """The folder of a hub model's snapshot in the hub cache; its name is the commit.

    Safetensors are preferred over other weight files. The cache locks each file, so concurrent processes share one
    download.

    Raises:
        UserError: the model cannot be downloaded; the message gives the reason and the remedy.
    """
    try:
        found = Path(
            snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
        if not any(found.glob("*.safetensors")):
            snapshot_download(model, revision=found.name, allow_patterns=["*.bin"])
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise UserError(_refusal(model, revision, e)) from e
    return found


def _refusal(model: str, revision: str | None, error: Exception) -> str:
    """A one-line message with the reason why the download failed, and the remedy."""
    if isinstance(error, GatedRepoError):
        return (
            f"model: {model} is gated; accept its terms on its hub page, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"revision: {model} has no branch, tag or commit {revision!r}; give one that its hub page lists"
        )
    what = f"model: {model} is neither a local folder nor an accessible hub model"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what}; check its name, and if it is private log in with `hf auth login`"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return (
        f"{what}{offline}; give a folder that contains config.json, or a hub id you have access to "
        f"({type(error).__name__})"
    )
