"""The demo: a generator of labelled stories, a small language model of them, and the whole job on both."""
