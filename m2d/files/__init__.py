"""Where files are and how they are written: locations, whole files, locks, progress. Knows no images and no Ray."""
