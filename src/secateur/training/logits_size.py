"""How a teacher's log-probabilities are divided into shards, and how large they are; torch is not needed."""

from __future__ import annotations

__all__ = ["count_windows", "logits_size", "windows_per_shard"]

_SHARDS = 64  #: shards of a slice, so that some processes have equal shares
_MOST_TOKENS = 2**20  #: tokens of a shard
_FEWEST_WINDOWS = 8  #: windows of a shard, unless that is too many tokens


def count_windows(tokens: int, sequence: int) -> int:
    """Number of windows that predict a token: a last window of one token has no row."""
    return -(-(tokens - 1) // sequence)


def windows_per_shard(tokens: int, sequence: int) -> int:
    """Windows in each shard but the last; a function of the slice alone, whoever computes it."""
    windows = max(_FEWEST_WINDOWS, -(-count_windows(tokens, sequence) // _SHARDS))
    return max(1, min(windows, _MOST_TOKENS // sequence))


def logits_size(tokens: int, sequence: int, top_k: int, vocabulary: int) -> int:
    """Bytes of the rows of a slice; headers and the manifest come besides, 400 bytes a shard."""
    id_bytes = 2 if vocabulary <= 2**16 else 4
    row = top_k * id_bytes + 2 * (top_k - 1) + 4 + 4
    return (tokens - count_windows(tokens, sequence) - (tokens % sequence == 1)) * row
