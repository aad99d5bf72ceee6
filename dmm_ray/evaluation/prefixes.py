"""Which test rows have an unseen prefix: a full token prefix that no training document starts with.

A causal language model gives identical activations for identical prefixes, so the prior was trained on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dmm_ray.store.split import hash_documents


def prefix_hashes(tokens: Sequence[int]) -> np.ndarray:
    """A 64-bit hash of every prefix ``tokens[: p + 1]``, uint64 (t,): sums of one random word per (position, token)."""
    ids = np.asarray(tokens, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return np.cumsum(
            hash_documents((np.arange(len(ids), dtype=np.uint64) << np.uint64(32)) | ids, seed=0)
        )


def unseen_prefixes(
    test: Mapping[int, Sequence[int]], training: Iterable[Sequence[int]]
) -> dict[int, np.ndarray]:
    """For each test document, whether each position's prefix is unseen: bool (t,) by document number.

    Only the test documents are held in memory; the training documents are streamed.

    Args:
        test: token ids by document number, position 0 included.
        training: token ids of every training document.
    """
    hashes = {doc: prefix_hashes(tokens) for doc, tokens in test.items()}
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
    seen = np.zeros(len(known), dtype=bool)
    for tokens in training:
        found = prefix_hashes(tokens)
        at = np.searchsorted(known, found).clip(max=max(len(known) - 1, 0))
        if len(known):
            seen[at[known[at] == found]] = True
    return {doc: ~seen[np.searchsorted(known, h)] for doc, h in hashes.items()}
