"""Measures on features and scores: no files, no Ray, no networks."""
