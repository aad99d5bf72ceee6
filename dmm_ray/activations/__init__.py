"""Activations on disk: extraction from text with Ray Data, the verified store, its reader."""
