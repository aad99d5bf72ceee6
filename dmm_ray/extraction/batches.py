"""Groups sequences into batches: packed end to end, or padded to similar lengths."""

from __future__ import annotations

from collections.abc import Sequence

PADDING_SHARE = 0.05


def packs(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences laid end to end: indices into ``lengths``, longest first, none of length 0.

    A pack has at most ``batch_tokens`` tokens, or a single sequence.
    """
    groups: list[list[int]] = []
    free = 0
    for i in _longest_first(lengths):
        if lengths[i] > free:
            groups.append([])
            free = batch_tokens
        groups[-1].append(i)
        free -= lengths[i]
    return groups


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences padded to the longest of their batch: indices into ``lengths``, longest first, none of length 0.

    A batch has at most ``batch_tokens`` tokens, of which at most 5 % are padding, or a single sequence.
    """
    groups: list[list[int]] = []
    tokens = 0
    for i in _longest_first(lengths):
        size = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else 0
        if groups and size <= batch_tokens and size - tokens - lengths[i] <= PADDING_SHARE * size:
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
