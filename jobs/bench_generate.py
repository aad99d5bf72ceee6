"""Benchmark of batched generation, ``python jobs/bench.py generate``: continuations per second of the demo's language
model, one at a time and in batches, with and without an intervention that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import medians

import dmm_ray
from dmm_ray.subject import Intervention, Site, SubjectModel

Say = Callable[[str], None]
PROMPTS = [f"Once upon a time there was a {who}" for who in ("cat", "king", "girl who liked to sing", "boy")]
TOKENS = 20
KEEP = Intervention(Site(2), lambda x, _ids: x, prompt=False)


def bench(say: Say, small: bool = False) -> None:
    """Batches of 1, 32 and 128 prompts of different lengths, 20 tokens each; ``small`` only checks that it runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SubjectModel.from_pretrained(
        str(Path(dmm_ray.__file__).parent / "demo" / "subject"), device=device, head=True
    )
    for size in (1, 2) if small else (1, 32, 128):
        prompts = (PROMPTS * size)[:size]
        write = partial(model.generate, prompts, max_tokens=TOKENS, temperature=1.0, batch_size=size)
        calls = {"plain": write, "with an intervention": partial(write, [KEEP])}
        for name, seconds in medians(calls, rounds=1 if small else 5).items():
            say(f"generate, batch of {size}, {name}: {size / seconds:.1f} continuations/s of {TOKENS} tokens")
