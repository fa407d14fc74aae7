"""The pruning methods: one file for each formula, the base classes, the selector and the registry of names.

To write a method, subclass one of the classes exported here; see docs/write-a-method.md.
"""

from typing import TYPE_CHECKING, Any

from secateur.methods.registry import get_method, known_methods

if TYPE_CHECKING:
    from secateur.methods.base import (
        LayerMethod,
        LearnedMethod,
        Method,
        Place,
        RemovalMethod,
        Selector,
        Statistics,
        WeightMethod,
        WidthMethod,
    )

__all__ = [
    "LayerMethod",
    "LearnedMethod",
    "Method",
    "Place",
    "RemovalMethod",
    "Selector",
    "Statistics",
    "WeightMethod",
    "WidthMethod",
    "get_method",
    "known_methods",
]


def __getattr__(name: str) -> Any:
    """Import a base class at its first use, since that imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from secateur.methods import base

    return getattr(base, name)
