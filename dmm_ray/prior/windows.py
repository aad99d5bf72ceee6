"""Means of a score over consecutive tokens of a document: they tell apart texts that single tokens do not."""

from __future__ import annotations

import numpy as np


def window_means(values: np.ndarray, doc: np.ndarray, position: np.ndarray, width: int) -> np.ndarray:
    """The mean of each row's own value and those of the ``width - 1`` tokens before it, (n,) float64.

    NaN unless all of the document's tokens ``position - width + 1`` to ``position`` are among the rows, each once, and
    none of their values is NaN. The rows may come in any order.

    Args:
        values: (n,) a score of each row.
        doc: (n,) integers.
        position: (n,) integers: tokens from the document's start.
        width: window width in tokens, 1 or more.
    """
    out = np.full(len(values), np.nan)
    if len(values) < width:
        return out
    order = np.lexsort((position, doc))
    ranked, place, origin = np.asarray(values, np.float64)[order], position[order], doc[order]
    first, last = slice(0, len(order) - width + 1), slice(width - 1, None)
    step = np.diff(place.astype(np.int64), prepend=place[:1].astype(np.int64))
    step[0] = 1
    broken = (step != 1) | (np.diff(origin, prepend=origin[:1]) != 0)
    breaks = np.cumsum(broken)
    whole = breaks[last] == breaks[first]
    means = np.lib.stride_tricks.sliding_window_view(ranked, width).mean(axis=1)
    out[order[last]] = np.where(whole, means, np.nan)
    return out
