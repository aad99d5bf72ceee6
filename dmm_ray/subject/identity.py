"""What determines a model's rows besides weights and ``config.json``: tokenizer, chat template, code, RoPE settings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmm_ray.files import hash_json, sha256

LIBRARIES = ("torch", "transformers", "tokenizers")
"""The libraries that compute rows: other versions may change the last bits, or more where a bug was fixed."""
REMOTE = "transformers_modules"
"""The package under which transformers imports a model's own code."""
COMMIT = re.compile(r"[0-9a-f]{40}")
ESCAPES = (("_dot_", "."), ("_hyphen_", "-"))
"""Undoes the escaping by which transformers turns repository names into module names."""


def library_versions() -> dict[str, str]:
    """The versions of ``LIBRARIES`` in this process."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def code_hashes(classes: Iterable[type]) -> dict[str, str]:
    """SHA-256 by name of each Python file that came with a model and that defines any of ``classes`` or their bases.

    Files from another repository, which ``auto_map`` may refer to ("owner/name--module.Class"), are prefixed with its
    name. The files hashed are those that transformers imported; relative imports are followed.
    """
    # Slow to import, and few models come with code.
    from transformers.dynamic_module_utils import get_relative_import_files

    modules = {base.__module__ for cls in classes for base in cls.__mro__}
    found = {}
    for name in sorted(module for module in modules if module.partition(".")[0] == REMOTE):
        package, file = name.split(".")[1:-1], sys.modules[name].__file__
        assert file is not None
        for path in (file, *get_relative_import_files(file)):
            found[_repository(package) + Path(path).name] = sha256(str(path))
    return found


def _repository(package: list[str]) -> str:
    """``owner/name/`` for a package that came from the hub, an empty string for one from the model's own folder."""
    if not package or not COMMIT.fullmatch(package[-1]):
        return ""
    name = "/".join(package[:-1]) + "/"
    for written, meant in ESCAPES:
        name = name.replace(written, meant)
    return name


def rope_settings(config: Any) -> dict[str, Any]:
    """Settings of the rotary position embedding in a text model's ``config``, defaults filled in, as JSON values.

    A configuration file may leave them to the library, whose defaults have changed between versions.
    """
    found = {
        name: value
        for name, value in config.to_dict().items()
        if re.search("rope|rotary", name) and value is not None
    }
    return dict(json.loads(json.dumps(found, sort_keys=True, default=str)))


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that determines how text, and chats if there is a chat template, become tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # We always tokenise without either, which switches them off; a newly loaded tokenizer may still have them on.
        backend.no_truncation()
        backend.no_padding()
        digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:
        digest = hash_json([type(tokenizer).__name__, tokenizer.get_vocab()])
    template = tokenizer.chat_template
    return hash_json([digest, template]) if template else digest


def tokenizer_file_hashes(tokenizer: Any, folder: Path) -> dict[str, str]:
    """SHA-256 of a slow (Python) tokenizer's vocabulary files, the only place where its merges or scores are visible;
    empty for fast tokenizers, which :func:`tokenizer_hash` covers completely."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return {}
    names = sorted({"tokenizer_config.json", *tokenizer.vocab_files_names.values()})
    return {name: sha256(str(folder / name)) for name in names if (folder / name).is_file()}
