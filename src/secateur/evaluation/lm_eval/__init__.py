"""Tasks of lm-evaluation-harness: lists of tasks, local data, batched likelihoods, and figures item by item."""
