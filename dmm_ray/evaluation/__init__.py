"""Measuring a prior against classical baselines on held-out documents, and the report of it."""
