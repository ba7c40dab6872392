"""Generation: requests, the generator and what it writes."""
