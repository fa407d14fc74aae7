"""The methods that installed packages announce. ``--help`` lists them: neither they nor PyTorch are loaded here."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from secateur.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["plugin_methods"]

ENTRY_POINTS = "secateur.methods"  #: where installed packages announce methods of their own


def plugin_methods(taken: Container[str]) -> dict[str, EntryPoint]:
    """Name -> where the method is, for every name that is not ``taken``.

    Raises:
        UserError: if what a package says of itself cannot be read.
    """
    from importlib.metadata import entry_points  # late, since every verb's parser passes by this module

    try:
        return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in taken}
    except Exception as error:  # what is read there is anybody's
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the entry points of an installed package cannot be read: {text}") from None
