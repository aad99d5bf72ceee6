"""Resumable work in units on a Ray Data actor pool: the folder, its lock, the actors."""
