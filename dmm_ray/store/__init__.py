"""Activations on disk: the verified store, its metadata, reader and writer."""
