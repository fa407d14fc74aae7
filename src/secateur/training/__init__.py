"""Training under an exact token budget: read ``loop`` downward; ``job`` runs a request."""
