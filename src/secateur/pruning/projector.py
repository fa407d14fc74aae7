"""Score the inner channels of a projector whose width is the language model's hidden size."""

from __future__ import annotations

from torch import Tensor

from secateur.formatting import percent
from secateur.methods.selection import keep_channels
from secateur.model.checkpoint import Checkpoint
from secateur.model.image_text import ImageTextModel
from secateur.progress import notify

__all__ = ["keep_projector"]


def keep_projector(checkpoint: Checkpoint, keep_hidden: Tensor, channels: int) -> dict[str, Tensor]:
    """Select the inner channels of a projector; nothing where it has a width of its own.

    Text goes through no projector, so that the weights alone decide: a channel's score is the norm of the weights that
    make it, times the norm of the weights that read it and stay::

        S_j = ||W1_j|| * ||W2_ij over kept i||

    Args:
        keep_hidden: the hidden channels that stay.
        channels: how many inner channels stay.

    Returns:
        Fields of a plan: sorted indices of the channels that stay.
    """
    around = checkpoint.image_text
    if around is None or not around.wrapper.projector or len(keep_hidden) == checkpoint.shape.hidden:
        return {}
    first, second = (_weight(around, f"{module}.weight") for module in around.wrapper.projector)
    scores = first.norm(dim=1) * second[keep_hidden].norm(dim=0)
    keep = keep_channels(scores, channels)
    share = float(scores[keep].sum() / scores.sum())
    notify(
        f"projector: {channels} of {len(scores)} inner channels stay, since their number is the hidden size; they have "
        f"{percent(share)} of the importance, by weights alone: text does not go through it"
    )
    return {"keep_projector": keep}


def _weight(around: ImageTextModel, module: str) -> Tensor:
    name = next(name for name in around.outside if name.endswith(module))
    return around.outside[name].tensor(name).float()
