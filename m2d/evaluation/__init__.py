"""Judging: how well features tell the diagnoses apart."""
