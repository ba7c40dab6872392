"""Images in: catalog, split, decoding, demo data and the training stream."""
