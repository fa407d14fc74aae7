"""Dropout, which training leaves out."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from secateur import distributed
from secateur.progress import notify

__all__ = ["disable_dropout"]


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every rate of dropout in a model and its config to zero, and print those that were not.

    The rates in config.json describe the run that its authors made. Here they would add noise to losses, gates and
    comparisons, and a teacher would differ from a student that is its copy. Files keep them.
    """
    rates = _rates(model.config)
    for key in rates:
        setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in _rates(module):
            setattr(module, key, 0.0)
    if rates and distributed.is_main():
        values = ", ".join(f"{key} {value:g}" for key, value in rates.items())
        notify(f"training sets dropout to 0 (config.json has {values})")


def _rates(holder: Any) -> dict[str, float]:
    """The rates of dropout, above zero, among an object's own attributes."""
    return {
        key: value
        for key, value in vars(holder).items()
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, (int, float)) and value
        if not key.startswith("classifier")  # of another kind of model
    }
