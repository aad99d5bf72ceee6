"""Applies a prior to entire stores with Ray Data: score, denoise, encode, sample."""
