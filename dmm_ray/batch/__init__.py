"""A prior over whole stores, with Ray Data: score, denoise, encode, sample."""
