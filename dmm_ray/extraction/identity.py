"""Records the identity of a store's model, and finds which part of a given model differs from it."""

from __future__ import annotations

import logging

from dmm_ray.files import exists, join
from dmm_ray.store.manifest import MANIFEST, Manifest, ResolvedEntry, SubjectEntry, read_manifest
from dmm_ray.subject import SubjectSource
from dmm_ray.subject.identity import library_versions

logger = logging.getLogger(__name__)


def subject_entry(source: SubjectSource, block_path: str | None, n_layers: int) -> SubjectEntry:
    """Everything about a model that determines its rows, for the manifest."""
    return SubjectEntry(
        id=source.model_id,
        revision=source.revision,
        weights_hash=source.weights_hash,
        files=source.file_hashes,
        block_path=block_path,
        n_layers=n_layers,
        context=source.context,
        resolved=resolved_entry(source),
    )


def resolved_entry(source: SubjectSource) -> ResolvedEntry:
    """What determines the rows in addition to the files that are hashed as a whole."""
    return ResolvedEntry(
        chat_template=source.chat_template_hash,
        code=source.code_hashes,
        rope=source.rope,
        tokenizer_files=source.tokenizer_files,
        versions=library_versions(),
    )


def comparable(manifest: Manifest, out: str) -> Manifest:
    """``manifest`` in a form comparable with that of ``out``: a store started before code and settings were recorded
    is resumed without them. Warns if it was started with different library versions."""
    if not exists(join(out, MANIFEST)):
        return manifest
    there = read_manifest(out)
    if there.subject.resolved is None:
        subject = manifest.subject.model_copy(update={"resolved": None})
        return manifest.model_copy(update={"subject": subject}).sealed()
    warn_of_versions(there.subject, out)
    return manifest


def warn_of_versions(entry: SubjectEntry, store: str) -> None:
    """Warn of libraries whose versions differ from those that computed the rows of ``store``."""
    then, now = entry.resolved.versions if entry.resolved else {}, library_versions()
    changed = [f"{name} {then[name]} (here {now[name]})" for name in then if then[name] != now.get(name)]
    if changed:
        logger.warning("%s: started with %s; rows may differ by rounding", store, ", ".join(changed))


def changed_part(source: SubjectSource, manifest: Manifest, *, files: bool = True) -> str | None:
    """The first part of a model that is missing or differs from the store's; None if all parts match.

    Args:
        source: the model.
        manifest: the manifest of the store.
        files: also compare ``config.json`` and the weights, which requires reading all of them.
    """
    entry = manifest.subject
    then: dict[str, object] = {}
    now: dict[str, object] = {}
    if files:
        then |= entry.files or {"its weights": entry.weights_hash}
        now |= source.file_hashes if entry.files else {"its weights": source.weights_hash}
    if entry.resolved is not None:
        then |= entry.resolved.identity()
        now |= resolved_entry(source).identity()
    for part in sorted(then.keys() | now.keys()):
        if then.get(part) != now.get(part):
            return part
    return None if source.tokenizer_hash == manifest.tokenizer_hash else "tokenizer"
