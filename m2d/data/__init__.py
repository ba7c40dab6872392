"""Images in: download, catalog, split, decoding and the training stream."""
