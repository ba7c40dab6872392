"""Does the synthetic set help a classifier on unseen lesions? And the linear probe of an extractor's features."""
