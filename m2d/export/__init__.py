"""What people load and share of a checkpoint: a diffusers pipeline, a folder with a model card, a repository."""
