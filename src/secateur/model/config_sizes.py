"""Sizes from a config: checked, or a product of several keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.errors import UserError
from secateur.model.families import Family

__all__ = ["check_sizes", "groups_of", "product_of"]


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Refuse sizes (config key -> value) that are no whole numbers above zero."""
    for key, size in sizes.items():
        if not isinstance(size, int) or not 1 <= size < 2**24:
            raise UserError(f"{where}: {key} should be a whole number above zero and below {2**24:,}, not {size!r}")


def product_of(name: str, factors: Sequence[str | int | Callable[[Any], int]], config: Any, where: str) -> int:
    """The size of a space from its factors; see :attr:`Family.fixed`."""
    sizes: dict[str, Any] = {}
    for factor in factors:
        if isinstance(factor, str):
            values = [_read(config, key) for key in factor.split("|")]
            sizes[factor] = next(filter(None, values), values[-1])
        else:
            sizes[f"{name} ({len(sizes)})"] = factor if isinstance(factor, int) else factor(config)
    check_sizes(sizes, where)
    return math.prod(sizes.values())


def _read(config: Any, key: str) -> Any:
    """The value of a config key; of a number, the number."""
    return int(key) if key.isdigit() else getattr(config, key, None)


def groups_of(family: Family, config: Any) -> tuple[int, int]:
    """The number of groups that a router chooses experts in, and of those that a token's experts come from."""
    if family.expert_groups is None:
        return 1, 1
    groups, groups_per_token = (getattr(config, key, None) or 1 for key in family.expert_groups)
    return int(groups), int(groups_per_token)
