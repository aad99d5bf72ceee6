"""Extracts activations from text into a store, with truncated language models in a pool of actors."""
