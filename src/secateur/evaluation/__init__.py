"""Measuring checkpoints: losses under protocols, tasks of lm-eval, cost; results item by item."""
