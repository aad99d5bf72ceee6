"""Every operation for a while: every answer right, memory flat.

``DMM_SOAK_S`` (20) seconds of it.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from serving.text_app import TEXT
from serving.under_fire import Known, Question, resident, steadily

from dmm_ray.client import Client, ClientError
from dmm_ray.prior import ActivationPrior

SOAK_S = float(os.environ.get("DMM_SOAK_S", "20"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240 + 2 * SOAK_S)]
WARM_UP = 1 / 3
"""Of the time: allocators and caches fill up first."""
MOST_GROWTH = 24 << 20
"""Bytes from the first to the last of the time after that, by the fitted line: noise of the allocators in a minute."""
POLL_S = 0.25
D = 32
QUESTIONS = [
    *(
        Question("log_prob", n, 1, D, {"steps": 4, "probes": p})
        for n, p in ((1, 2), (7, 1), (150, 1), (3, 0))
    ),
    *(Question("denoise", n, 2, D, {"steps": 3, "u": u}) for n, u in ((1, 0.2), (90, 0.7))),
    Question("denoise", 5, 3, D, {"mode": "mean"}),
    *(Question("sample", n, 4, D, {"steps": 3}) for n in (1, 80)),
    *(Question("encode", n, 5, D) for n in (2, 70)),
]


def test_every_answer_is_right_and_memory_is_flat(url: str, folder: Path) -> None:
    prior = ActivationPrior.from_pretrained(str(folder / "default"))
    known = [Known(question, prior) for question in QUESTIONS]
    dice = random.Random(0)
    with Client(url, chunk_rows=40) as client:
        nats = client.score_text(TEXT, steps=2).nats
        text = client.generate(TEXT, "up", max_tokens=3, steps=2).text

        def work() -> None:
            dice.choice(known).check(client)
            kind = dice.randrange(8)
            if kind == 0:
                np.testing.assert_allclose(client.score_text(TEXT, steps=2).nats, nats, rtol=1e-4, atol=1e-3)
            elif kind == 1:
                assert client.generate(TEXT, "up", max_tokens=3, steps=2).text == text
            elif kind == 2:
                next(client.generate_stream(TEXT, max_tokens=3, steps=2))  # and goes away
            elif kind == 3:
                with pytest.raises(ClientError):
                    client.log_prob(np.zeros((1, D + 1)))

        with steadily(work, threads=3) as steady:
            when, bytes_ = _watch()
        assert len(steady.results) > 30
    late = when > WARM_UP * SOAK_S
    slope = np.polyfit(when[late], bytes_[late], 1)[0]
    assert slope * (1 - WARM_UP) * SOAK_S < MOST_GROWTH, f"{slope / 1024:.0f} KiB/s over {bytes_[-1]} bytes"


def _watch() -> tuple[np.ndarray, np.ndarray]:
    """Seconds since the start, and the endpoint's memory then, until the time is over."""
    start, found = time.monotonic(), []
    while (now := time.monotonic() - start) < SOAK_S:
        found.append((now, float(resident())))
        time.sleep(POLL_S)
    when, bytes_ = np.array(found).T
    return when, bytes_
