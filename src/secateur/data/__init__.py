"""Corpora: read text, tokenize it, write token shards, read exact slices."""
