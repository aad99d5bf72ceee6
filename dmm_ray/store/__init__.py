"""Activations on disk: the verified store, what it says of itself, its reader and writer."""
