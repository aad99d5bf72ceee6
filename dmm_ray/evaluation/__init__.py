"""Comparing a prior with classical baselines on held-out documents, and the report."""
