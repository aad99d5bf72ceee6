"""Kinds of text files: how each is scanned once, and its documents read from any place."""
