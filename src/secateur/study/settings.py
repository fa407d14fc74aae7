"""The settings of a comparison: what a from-scratch twin shares with the pruned run."""

from __future__ import annotations

from typing import Literal

__all__ = ["TWIN_NAMES", "SettingKind"]

SettingKind = Literal["equal_training_tokens", "equal_total_tokens", "equal_training_flops", "equal_total_flops"]

#: Name of a from-scratch twin, by the quantity that it shares with the pruned run.
TWIN_NAMES: dict[SettingKind, str] = {
    "equal_training_tokens": "S_R",
    "equal_total_tokens": "S_{P+R}",
    "equal_training_flops": "S_F",
    "equal_total_flops": "S_{P+F}",
}
