"""Describe a checkpoint: its shape, sparsity, damage and provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.config import Positive, spec
from secateur.evaluation.cost import sparsity
from secateur.hub import local_checkpoint
from secateur.model.checkpoint import Checkpoint, is_finite, max_positions
from secateur.model.description import describe_shape, flops_context
from secateur.model.layer_pattern import layer_kinds
from secateur.model.runtimes import Support, Traits, check_runtimes
from secateur.model.shapes import Shape
from secateur.progress import track

__all__ = ["InspectRequest", "Inspection", "inspect_checkpoint"]


@spec
class InspectRequest:
    """A checkpoint to describe.

    Attributes:
        model: a checkpoint directory, a Hub name, or the result of an earlier call.
        context: window that FLOPs per token are averaged over; None for 2048, or the model's limit if less.
    """

    model: Any
    context: Positive | None = None


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint."""

    model: str
    shape: Shape
    context: int  #: window that FLOPs per token are averaged over
    sparsity: float  #: share of the block linears' weights that are zero
    not_finite: list[str]  #: tensors that hold NaN or infinity
    dtype: str
    digest: str  #: SHA-256 of weights and configuration
    provenance: dict[str, Any] | None  #: content of secateur.json; None for a checkpoint of other origin
    runs_in: tuple[Support, ...]  #: what is known of each runtime and this checkpoint
    #: of the image-text model around the language model: ``model_type`` and ``parameters``; None without one
    image_text: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur inspect --json`` prints them."""
        content = {key: value for key, value in vars(self).items() if key not in ("shape", "context")}
        content["runs_in"] = [support.record() for support in self.runs_in]
        content |= {"axes": list(self.shape.family.axes), "uncut": dict(self.shape.family.uncut)}
        return {"model": content.pop("model"), **describe_shape(self.shape, self.context), **content}


def inspect_checkpoint(request: InspectRequest) -> Inspection:
    """Read a checkpoint's weights to count zeros and to look for NaN; nothing is run."""
    checkpoint = Checkpoint(local_checkpoint(request.model))
    return Inspection(
        model=str(request.model),
        shape=checkpoint.shape,
        context=flops_context(request.context, max_positions(checkpoint.config)),
        provenance=checkpoint.provenance,
        not_finite=_not_finite(checkpoint),
        sparsity=sparsity(checkpoint),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        digest=checkpoint.digest,
        runs_in=check_runtimes(_traits(checkpoint)),
        image_text=_around(checkpoint),
    )


def _traits(checkpoint: Checkpoint) -> Traits:
    """What decides where a checkpoint runs; one that secateur did not write counts as uncut."""
    kinds = layer_kinds(checkpoint.config)
    before = None if checkpoint.provenance else checkpoint.shape
    return Traits(checkpoint.shape, kinds, before, bool(checkpoint.whole), kinds)


def _around(checkpoint: Checkpoint) -> dict[str, Any] | None:
    around = checkpoint.image_text
    return {"model_type": around.whole.config.model_type, "parameters": around.parameters} if around else None


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    """The tensors that hold NaN or infinity."""
    names = []
    with track("look for NaN", len(checkpoint.tensors())) as progress:
        for name in checkpoint.tensors():
            if not is_finite(checkpoint.tensor(name)):
                names.append(name)
            progress.advance()
    return names
