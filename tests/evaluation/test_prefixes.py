"""Unseen prefixes against a brute-force search."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmm_ray.evaluation.prefixes import prefix_hashes, unseen_prefixes

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_equals_brute_force(test, training):
    found = unseen_prefixes(dict(enumerate(test)), training)
    for number, tokens in enumerate(test):
        expected = [not any(d[: p + 1] == tokens[: p + 1] for d in training) for p in range(len(tokens))]
        assert found[number].tolist() == expected


def test_a_prefix_must_start_a_document_and_keep_its_order():
    found = unseen_prefixes({7: [1, 2, 3]}, [[0, 1, 2, 3], [2, 1, 3], [1, 2]])
    assert found[7].tolist() == [False, False, True]


def test_hashes_of_many_prefixes_are_distinct():
    rng = np.random.default_rng(0)
    hashes = np.concatenate([prefix_hashes([first, *rng.integers(0, 50_000, 499)]) for first in range(200)])
    assert len(np.unique(hashes)) == len(hashes)
