"""What a verb returns, and how its arguments become a request."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any, TypeVar

__all__ = ["Answer", "request_of"]

Answer = tuple[dict[str, Any], str, int]  #: a JSON-able answer, its text for people, the exit code
T = TypeVar("T")


def request_of(cls: type[T], arguments: Namespace, **values: Any) -> T:
    """Make the request ``cls`` from the arguments that are named as its fields, and ``values`` besides."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    fields = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return cls(**(fields | values))
