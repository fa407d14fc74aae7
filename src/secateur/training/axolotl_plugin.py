"""Masks in Axolotl: a plug-in for the list ``plugins:`` of its configuration file."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]

from secateur.training.keep_masks import KeepMasks

__all__ = ["KeepMasksPlugin"]


class KeepMasksPlugin(BasePlugin):
    """Keep the zeros of the sparse checkpoint that ``base_model:`` names.

    In the configuration file::

        base_model: PRUNED
        plugins: [secateur.training.axolotl_plugin.KeepMasksPlugin]
    """

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[KeepMasks]:
        return [KeepMasks(cfg.base_model)]
