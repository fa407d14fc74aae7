"""What a verb gives back."""

from typing import Any

__all__ = ["Answer"]

Answer = tuple[dict[str, Any], str, int]  #: a JSON-able answer, its text for people, the exit code
