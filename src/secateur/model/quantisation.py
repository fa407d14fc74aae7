"""Weights of a finished model as they are served: in bfloat16, or as integers with a scale for each group.

Weight-only: products are in the type that the model computes in, so that figures tell what the weights lose, not what a
kernel does. The matrices of the blocks become integers, those of routed experts included; embeddings, head, norms,
routers and biases stay as stored. Integers are symmetric, rounded to nearest without calibration, with scales in
bfloat16: zeros stay zero. torchao computes them, so that they are those of a model which it serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import UserError
from secateur.formatting import plural
from secateur.model.expert_matrices import is_expert_weight, weight_matrices
from secateur.progress import notify
from secateur.runtime import install_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from secateur.model.checkpoint import Checkpoint
    from secateur.model.families import Axis

__all__ = ["WEIGHT_FORMATS", "ServedWeights", "WeightFormat", "WeightKind", "require_quantiser", "serve"]

WeightKind = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a matrix are stored."""

    bits: int  #: of a weight
    group: int | None = None  #: weights of a row that share a scale; None: all of the row
    scale_bits: int = 16  #: of a scale; 0 for a floating type, which has none

    def bytes(self, matrix: tuple[int, ...]) -> int:
        """The bytes of a matrix [..., out, in] and its scales."""
        scales = math.prod(matrix[:-1]) * (matrix[-1] // (self.group or matrix[-1]))
        return math.ceil((math.prod(matrix) * self.bits + scales * self.scale_bits) / 8)

    def __str__(self) -> str:
        if not self.scale_bits:
            return f"bfloat16, {self.bits} bits a weight"
        scales = f"{self.group} in a row" if self.group else "a row"
        return f"symmetric, {self.bits} bits a weight, one bfloat16 scale for {scales}"


WEIGHT_FORMATS: dict[WeightKind, WeightFormat] = {
    "bf16": WeightFormat(16, scale_bits=0),
    "int8": WeightFormat(8),
    "int4": WeightFormat(4, group=32),
}


@dataclass(frozen=True)
class ServedWeights:
    """What became of a model's weights."""

    weights: WeightKind
    bytes: int  #: of all weights as served, tied ones once
    converted: int  #: matrices in the served form; of bf16, all tensors
    as_stored: tuple[str, ...]  #: matrices of the blocks whose rows no group divides

    def record(self) -> dict[str, Any]:
        """The fields as plain values, with the form in words."""
        form = {"weights": self.weights, "form": str(WEIGHT_FORMATS[self.weights])}
        return {**form, "bytes": self.bytes, "converted": self.converted, "as_stored": list(self.as_stored)}


def require_quantiser(weights: WeightKind | None) -> None:
    """Check that what makes integers of weights is installed.

    Raises:
        UserError: if it is needed and is not there.
    """
    if weights is not None and WEIGHT_FORMATS[weights].scale_bits and find_spec("torchao") is None:
        raise UserError(f"`weights` {weights}: needs torchao; {install_command('secateur[quantisation]')}")


def serve(checkpoint: Checkpoint, model: PreTrainedModel, weights: WeightKind) -> ServedWeights:
    """Round a model's weights, in place, to the values that a server of ``weights`` computes with.

    A matrix whose rows no group divides stays as stored; a line names such matrices.

    Args:
        checkpoint: that the model was loaded from.

    Raises:
        UserError: if torchao is needed and is not installed.
    """
    import torch

    require_quantiser(weights)
    form, values, shape = WEIGHT_FORMATS[weights], model.state_dict(), checkpoint.shape
    blocks = {checkpoint.family.block_tensor(n, linear) for n in range(shape.layers) for linear in shape.linears(n)}
    size, converted, as_stored = 0, 0, []
    for name, axes in checkpoint.tensors().items():
        parts = _matrices(values[name], axes) if name in blocks else [values[name]]
        divisible = all(part.shape[-1] % (form.group or 1) == 0 for part in parts)
        if name in blocks and not divisible:
            as_stored.append(name)
        if weights == "bf16" or (name in blocks and divisible):
            converted += 1
            size += sum(form.bytes(tuple(part.shape)) for part in parts)
            with torch.no_grad():
                for part in parts:
                    part.copy_(_round_trip(part, form))
        else:
            size += values[name].numel() * checkpoint.dtype_of(name).itemsize
    if as_stored:
        notify(
            f"{checkpoint.directory}: {weights}: {len(as_stored)} of {plural(len(blocks), 'matrix', 'matrices')} in "
            f"the blocks stay as stored, since no group of {form.group} divides their rows: {', '.join(as_stored[:2])}"
            + (" ..." if len(as_stored) > 2 else "")
        )
    return ServedWeights(weights, size, converted, tuple(as_stored))


def _matrices(tensor: Tensor, axes: tuple[Axis, ...]) -> list[Tensor]:
    """The matrices [out, in] of a tensor, as views: one, or those of each expert."""
    if not is_expert_weight(axes):
        return [tensor]
    return [matrix for expert in tensor for matrix in weight_matrices(expert, axes)]


def _round_trip(matrix: Tensor, form: WeightFormat) -> Tensor:
    """The values of a matrix after it was stored in ``form``."""
    import torch

    if not form.scale_bits:
        return matrix.bfloat16()
    from torchao.quantization import IntxUnpackedToInt8Tensor  # type: ignore[import-not-found]

    integer = getattr(torch, f"int{form.bits}")
    block: Any = (1, form.group or matrix.shape[1])
    return IntxUnpackedToInt8Tensor.from_hp(matrix.bfloat16().contiguous(), block, integer).dequantize()
