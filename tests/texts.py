"""Random texts for tests."""

from __future__ import annotations

import random

WORDS = (
    "the cat sat on a red mat and saw one big dog run to town while rain fell over green hills near lake"
).split()


def make_texts(n: int, seed: int = 0, low: int = 5, high: int = 40) -> list[str]:
    """Random word sequences of ``low`` to ``high`` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(low, high))) for _ in range(n)]
