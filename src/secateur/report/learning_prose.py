"""Sentences about methods that train while they prune."""

from __future__ import annotations

from secateur.comparison.index import Index
from secateur.formatting import count
from secateur.methods.registry import method_name

__all__ = ["learning_notes"]


def learning_notes(index: Index) -> list[str]:
    """Say which twins train on more than R or P+R tokens: a sentence for each method; empty without any."""
    tokens = {pruned.method: pruned.training_tokens for pruned in index.results.pruned if pruned.training_tokens}
    return [
        f"Twins of {method_name(method)} train on L = {count(learned)} tokens more, as many as its pruning trains on."
        for method, learned in tokens.items()
    ]
