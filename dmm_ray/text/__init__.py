"""Documents out of text files of many kinds, on any file system."""
