"""Looking after experiment directories: list, show, clean, compare. Called by the command line; it trains nothing."""
