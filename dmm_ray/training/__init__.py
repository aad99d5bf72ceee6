"""Training priors with Ray Train: every result is a function of the samples seen."""
