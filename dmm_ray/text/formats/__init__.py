"""Text file formats: scanning each file once, and reading its documents from any point."""
