"""Zeros in the linears of a model's blocks that no mask protects: another tool's sparsity, or that of a saved copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.files import read_json
from secateur.model.plan import JSON_FILE
from secateur.model.shapes import Shape
from secateur.progress import notify

__all__ = ["MANY", "UNMASKED", "ZeroCount", "linear_names"]

MANY = 0.01  #: share of the weights of the block linears; dense checkpoints have far fewer exact zeros

#: advice on the zeros of a checkpoint that is pruned
UNMASKED = "pruning does not protect them, and training fills them unless it is asked to keep zeros (keep-zeros)"


def linear_names(shape: Shape) -> list[str]:
    """Names of the weights of all block linears, which sparse methods prune."""
    return [shape.family.block_tensor(layer, name) for layer in range(shape.layers) for name in shape.linears(layer)]


@dataclass
class ZeroCount:
    """Counts zeros among weights as they are read for another purpose."""

    zeros: int = 0  #: without a mask
    weights: int = 0
    revived: int = 0  #: not zero, although a mask drops them

    def add(self, zero: Tensor, mask: Tensor | None) -> None:
        """Count the zeros of a linear that stay without a mask.

        Args:
            zero: bool, True for a weight that is exactly zero.
            mask: bool of the same size, True where kept; None for no mask.
        """
        self.weights += zero.numel()
        self.zeros += int((zero if mask is None else zero & mask).count_nonzero())

    def add_revived(self, zero: Tensor, mask: Tensor | None) -> None:
        """Count the weights of a linear that the checkpoint's own mask, if it has one, drops and that are not zero."""
        self.revived += 0 if mask is None else int((zero | mask).logical_not_().count_nonzero())

    def warn(self, directory: Path, advice: str) -> None:
        """Print a line on revived weights, and one if at least the share ``MANY`` of all are zeros without a mask.

        Args:
            directory: of the checkpoint. Zeros with which a cut padded it do not count: they stay zero by themselves.
        """
        if self.revived:
            notify(
                f"{directory}: {self.revived:,} weights that its masks drop are not zero, and are set to zero; "
                f"remove {JSON_FILE} to leave out the masks"
            )
        if self.zeros and self.zeros >= MANY * self.weights and not _is_padded(directory):
            share = f"{100 * self.zeros / self.weights:.1f}%"
            notify(f"{directory}: {share} of the block linears' weights are zero and no mask protects them; {advice}")


def _is_padded(directory: Path) -> bool:
    """Whether a cut left layers of different widths, padded with zeros to the widest."""
    content = read_json(directory / JSON_FILE) if (directory / JSON_FILE).is_file() else {}
    return isinstance(content, dict) and "units_kept" in content.get("summary", {})
