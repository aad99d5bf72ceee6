"""Text to an activation store: truncated language models in a pool of actors."""
