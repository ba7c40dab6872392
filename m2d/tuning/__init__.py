"""Sweeps: Ray Tune over loss weights and learning rates. The top of the house but for the command line."""
