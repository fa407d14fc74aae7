"""The weight matrices of routed experts, which lie in tensors over all experts of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.model.families import SPACE_OF, Axis

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_expert_weight", "reads_hidden", "weight_matrices"]


def is_expert_weight(axes: tuple[Axis, ...]) -> bool:
    """Whether a tensor with these axes holds weight matrices of routed experts."""
    return len(axes) == 3 and axes[0] == "experts"


def reads_hidden(axes: tuple[Axis, ...]) -> bool:
    """Whether the matrices read the hidden state, as gate and up do; the others read the expert's own channels."""
    return any(isinstance(axis, tuple) or SPACE_OF.get(str(axis), axis) != axis for axis in axes)


def weight_matrices(tensor: Tensor, axes: tuple[Axis, ...]) -> list[Tensor]:
    """The matrices [out, in] within one expert's part [rows, columns] of a tensor: views of gate and up, or of down.

    Args:
        axes: of the tensor over all experts.
    """
    _, rows, columns = axes
    if isinstance(rows, tuple):  # gate above up
        return list(tensor.chunk(len(rows)))
    if columns == "expert_pair":  # transposed, with gate and up in turns
        return [tensor[:, 0::2].T, tensor[:, 1::2].T]
    return [tensor if columns == "expert_ffn" else tensor.T]
