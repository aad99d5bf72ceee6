"""Resumable work, divided into units, on a Ray Data actor pool: the folder, its lock and the actors."""
