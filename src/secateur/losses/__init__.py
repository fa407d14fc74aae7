"""Sums over the vocabulary in chunks of tokens: next-token losses and the divergence from a teacher, with gradients."""
