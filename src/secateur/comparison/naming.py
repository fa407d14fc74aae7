"""Names of models, comparisons and settings for tables and sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

from secateur.comparison.index import Group, Model
from secateur.comparison.twins import Setting
from secateur.formatting import count
from secateur.methods.registry import method_name

__all__ = ["BUDGETS", "group_name", "is_pattern", "model_name", "target_words"]

#: The quantity that is equal for both paths in each setting.
BUDGETS: dict[Setting, str] = {
    "training": "training tokens",
    "total": "total tokens",
    "training-flops": "training FLOPs",
    "total-flops": "total FLOPs",
}


def target_words(target: str) -> str:
    """``"0.5"`` -> ``"at ratio 0.5"``, ``"2:4"`` -> ``"at 2:4"``, ``"4b-depth"`` -> ``"to 4b-depth"``."""
    if re.fullmatch(r"0?\.\d+", target):
        return f"at ratio {target}"
    return f"at {target}" if is_pattern(target) else f"to {target}"


def is_pattern(target: str) -> bool:
    """Whether a target is an N:M pattern such as ``"2:4"``."""
    return re.fullmatch(r"\d+:\d+", target) is not None


def model_name(model: Model, among: Sequence[Model]) -> str:
    """The name of a pruned model: method, target and, if ``among`` has several, parent."""
    name = f"{method_name(model.method)} {target_words(model.target)}"
    return f"{name} ({model.parent})" if len({item.parent for item in among}) > 1 else name


def group_name(group: Group, among: Sequence[Group], *, target: bool = False) -> str:
    """The shortest name that distinguishes ``group`` within ``among``; ``target=True`` always names the target."""
    name = method_name(group.method)
    if target or len({item.target for item in among}) > 1:
        name += f" {target_words(group.target)}"
    notes = []
    if len({item.parent for item in among}) > 1:
        notes.append(f"parent {group.parent}")
    if len({item.retrain_tokens for item in among}) > 1:
        notes.append(f"R = {count(group.retrain_tokens)}")
    if group.objective and len({item.objective for item in among}) > 1:
        notes.append(group.objective)
    if group.seed is not None and len({item.seed for item in among}) > 1:
        notes.append(f"seed {group.seed}")
    return f"{name} ({', '.join(notes)})" if notes else name
