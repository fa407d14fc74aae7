"""N:M patterns of zeros."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import UserError

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern, as in 2:4: each group of M consecutive weights of a row keeps N.

    Attributes:
        keep: N, weights that stay.
        group: M, weights in a group.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.group:
            raise UserError(f"`pattern`: {self} must keep at least 1 weight, and at most all {self.group}")

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``N:M``; ``unstructured`` is None.

        Raises:
            UserError: on any other text, or N that is not above 0 and below M.
        """
        if text == "unstructured":
            return None
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
        if not match or not 1 <= int(match[1]) < int(match[2]):
            raise UserError(f"`pattern`: {text!r} is neither unstructured nor N:M, e.g. 2:4 (2 of each 4 weights stay)")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"
