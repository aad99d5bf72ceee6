"""Uploading a prior to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import safetensors
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dmm_ray.errors import UserError
from dmm_ray.files import exists, filesystem, is_local, join, read_json
from dmm_ray.prior import card, folder
from dmm_ray.prior.config import PriorConfig
from dmm_ray.provenance import SUMMARY

CARD = "README.md"


def push_to_hub(
    path: str,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str = "Upload a prior",
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload the prior in a folder, and nothing else from there, in one commit; returns the commit's URL.

    The repository is created if it does not exist. A README.md in the folder is uploaded as it is; otherwise a model
    card is generated.

    Args:
        path: a prior's local folder, as written by ``save_pretrained`` or ``dmm train``.
        repo_id: owner/name on the Hub.
        private: whether a new repository is private; None for the owner's default.
        license: the subject's licence, as the Hub spells it; None looks it up if the subject is on the Hub.
        commit_message: first line of the commit.
        token: Hub token; None uses that of the current login.
        revision: branch, created if it does not exist; None for the main one.

    Raises:
        UserError: not a prior's folder, an unknown licence, or the Hub refuses.
    """
    if not is_local(path) or folder.is_published(path):
        raise UserError(f"{path}: expected a local folder in this package's format; import or copy it first")
    config = folder.load_config(path)
    files: dict[str, str | bytes] = {
        name: _content(path, name) for name in folder.FILES if exists(join(path, name))
    }
    if folder.WEIGHTS not in files:
        raise UserError(f"{join(path, folder.WEIGHTS)}: no such file; copy the prior again")
    files[CARD] = _card(path, config, repo_id, license, token)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    except HFValidationError as e:
        raise UserError(f"repo_id: {' '.join(str(e).split())}") from e
    except (HfHubHTTPError, httpx.HTTPError, OSError) as e:
        raise UserError(
            f"{repo_id}: the Hub refused ({' '.join(str(e).split())[:200]}); "
            "log in with `hf auth login`, or give a token that may write there"
        ) from e
    except ValueError as e:
        raise UserError(f"{CARD}: the Hub rejected it ({' '.join(str(e).split())}); fix license=") from e
    return str(done.commit_url)


def _content(path: str, name: str) -> str:
    """A file's local path, which the Hub client reads in chunks."""
    return filesystem(join(path, name))[1]


def _card(
    path: str, config: PriorConfig, repo_id: str, license: str | None, token: str | None
) -> str | bytes:
    """The path of the folder's own card, or the text of a new one."""
    if exists(join(path, CARD)):
        return _content(path, CARD)
    fields = card.licence(config, license, token)
    return card.render(config, repo_id, fields, _figures(path), _parameters(path)).encode()


def _figures(path: str) -> dict[str, Any]:
    """The metrics in the run's ``summary.json``, if there is one."""
    summary = read_json(join(path, SUMMARY)) if Path(_content(path, SUMMARY)).exists() else {}
    return {k: v for k, v in summary.get("figures", {}).items() if isinstance(v, int | float | str)}


def _parameters(path: str) -> int:
    """The network's parameter count, from the file's header."""
    with safetensors.safe_open(_content(path, folder.WEIGHTS), framework="pt") as f:
        names = [name for name in f.keys() if name.startswith("denoiser.")]  # noqa: SIM118
        return sum(math.prod(f.get_slice(name).get_shape()) for name in names)
