"""Reads documents from text files of many formats, on any file system."""
