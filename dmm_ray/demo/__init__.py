"""The demo: a generator of labelled stories, a small language model trained on them, and the full pipeline on both."""
