"""Drawing: pure functions from arrays to pictures. Knows the classes, no training, no files and no torch."""
