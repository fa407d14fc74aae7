"""Training losses computed in chunks, so that full logits are never in memory."""
