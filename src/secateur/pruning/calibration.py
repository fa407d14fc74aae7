"""The token ids that scores are computed on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.data.tokenizer import token_hash
from secateur.errors import UserError
from secateur.evaluation.token_windows import calibration_windows
from secateur.model.checkpoint import Checkpoint

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """The token ids that scores are computed on."""

    windows: Tensor  #: int64 [windows, positions]
    source: str  #: where they are from

    def record(self) -> dict[str, Any]:
        """What identifies them."""
        count, length = self.windows.shape
        return {
            "source": self.source,
            "windows": count,
            "seqlen": length,
            "tokens": count * length,
            "hash": token_hash(self.windows.numpy()),
        }

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        source: Calibration | Tensor | str | Iterable[str],
        *,
        field: str | None = None,
        windows: int | None = None,
        seqlen: int | None = None,
        tokenizer: Any = None,
    ) -> Calibration:
        """Read calibration windows from a source of text, ids [windows, positions], or an iterable of texts.

        Raises:
            UserError: if the source cannot be read, does not fit the model, or is shorter than one window.
        """
        if isinstance(source, Calibration):
            return source
        if not isinstance(source, str) and hasattr(source, "shape"):
            return cls(_checked_ids(checkpoint, torch.as_tensor(source)), "token ids")
        cut = calibration_windows(checkpoint, source, field=field, windows=windows, seqlen=seqlen, tokenizer=tokenizer)  # type: ignore[arg-type]
        return cls(cut, source if isinstance(source, str) else "texts")


def _checked_ids(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids) or ids.is_floating_point():
        raise UserError(
            f"`calibration`: ids must be whole numbers of size [windows, positions] with two positions or more, got "
            f"{str(ids.dtype).removeprefix('torch.')} of size {list(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= checkpoint.shape.vocabulary:
        raise UserError(
            f"`calibration`: ids lie between {low} and {high}, but the model's vocabulary is "
            f"{checkpoint.shape.vocabulary}"
        )
    return ids.to("cpu", torch.int64)
