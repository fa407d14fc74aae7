"""Prune a language model or train a small one from scratch? Secateur measures, and says."""

from secateur.version import __version__

__all__ = ["__version__"]
