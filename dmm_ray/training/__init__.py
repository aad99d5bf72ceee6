"""Training of priors with Ray Train: every number is a function of the samples seen."""
