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
    """Upload the prior in a folder, and nothing else that lies there, in one commit; the commit's URL.

    The repository is created where there is none. A README.md in the folder goes along as it is; otherwise a model card
    is written.

    Args:
        path: a local prior's folder, as ``save_pretrained`` or ``dmm train`` writes.
        repo_id: owner/name on the Hub.
        private: of a new repository; None for the owner's default.
        license: the subject's licence, as the Hub spells it; None looks it up where the subject is on the Hub.
        commit_message: first line of the commit.
        token: of the Hub; None for the one logged in with.
        revision: branch, created where there is none; None for the main one.

    Raises:
        UserError: not a prior's folder, a licence not known, or the Hub refuses.
    """
    if not is_local(path) or folder.is_published(path):
        raise UserError(f"{path}: a local folder in this package's format is needed; import or copy it first")
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
        raise UserError(f"{CARD}: the Hub does not take it ({' '.join(str(e).split())}); fix license=") from e
    return str(done.commit_url)


def _content(path: str, name: str) -> str:
    """A file's path on this machine, which the client reads piece by piece."""
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
    """What the run's ``summary.json`` says was measured, if it is there."""
    summary = read_json(join(path, SUMMARY)) if Path(_content(path, SUMMARY)).exists() else {}
    return {k: v for k, v in summary.get("figures", {}).items() if isinstance(v, int | float | str)}


def _parameters(path: str) -> int:
    """The number of the network's weights, from the file's header."""
    with safetensors.safe_open(_content(path, folder.WEIGHTS), framework="pt") as f:
        names = [name for name in f.keys() if name.startswith("denoiser.")]  # noqa: SIM118
        return sum(math.prod(f.get_slice(name).get_shape()) for name in names)
