"""Splits documents into train, validation and test by a seeded hash of the document number."""

from __future__ import annotations

import numpy as np
from pydantic import model_validator

from dmm_ray.config import Config
from dmm_ray.seeds import splitmix64

TRAIN, VALIDATION, TEST = 0, 1, 2
PARTS = ("train", "validation", "test")


class Split(Config):
    """Fractions of documents per part; a document's part depends only on its number and the seed."""

    seed: int = 0
    """Seed of the assignment."""
    train: float = 0.9
    """Fraction of documents to train on."""
    validation: float = 0.05
    """Fraction used for choices, such as sizes, and for monitoring."""
    test: float = 0.05
    """Fraction used only for reported results."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Split:
        parts = (self.train, self.validation, self.test)
        if min(parts) < 0 or abs(sum(parts) - 1) > 1e-6:
            raise ValueError(
                f"train, validation and test must be non-negative and add up to 1, not {sum(parts):g}"
            )
        return self

    def of(self, doc: np.ndarray) -> np.ndarray:
        """The part of each document: uint8, TRAIN 0, VALIDATION 1 or TEST 2."""
        share = hash_documents(doc, self.seed) / 2.0**64
        return ((share >= self.train).astype(np.uint8) + (share >= self.train + self.validation)).astype(
            np.uint8
        )


def hash_documents(doc: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 per document: SplitMix64 of doc xor a hashed seed."""
    return splitmix64(np.asarray(doc).astype(np.uint64) ^ splitmix64(np.array(seed % 2**64, dtype=np.uint64)))
