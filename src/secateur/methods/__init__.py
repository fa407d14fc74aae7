"""The pruning methods: one file for each formula, the base classes, the selector and the registry of names.

A method of your own subclasses one of the classes exported here; see docs/write-a-method.md.
"""

from typing import Any

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
    """Import what a plug-in needs when it is first used: it imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from secateur.methods import base

    return getattr(base, name)
