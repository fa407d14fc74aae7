"""Training under an exact token budget."""
