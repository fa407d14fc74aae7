"""Checkpoints of the Hugging Face Hub as local directories."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import UserError

__all__ = ["local_checkpoint"]

_TOKENIZER = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def local_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The directory that ``name`` stands for; a model of the Hub is downloaded into its cache, weights and tokenizer.

    Args:
        name: a directory, or ``hf:NAME`` with or without ``@REVISION``.
        weights: whether they are wanted, besides configuration and tokenizer.

    Raises:
        UserError: if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    if not name.startswith("hf:"):
        return Path(name)
    repository, _, revision = name.removeprefix("hf:").partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_TOKENIZER + _WEIGHTS * weights)
        )
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{name}: cannot be downloaded ({text}); give the network, a token where it is needed, or a local directory"
        ) from None
