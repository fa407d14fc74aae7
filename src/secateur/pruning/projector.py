"""Score the inner channels of a projector whose width is the language model's hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.image_walk import ImageWalk
from secateur.formatting import percent
from secateur.methods.selection import keep_channels
from secateur.model.checkpoint import Checkpoint
from secateur.model.image_text import ImageTextModel
from secateur.progress import notify

__all__ = ["keep_projector"]


def keep_projector(
    checkpoint: Checkpoint, keep_hidden: Tensor, channels: int, walk: BlockWalk | None = None
) -> dict[str, Tensor]:
    """Select the inner channels of a projector; nothing where it has a width of its own.

    A channel's score is what it puts out in the root mean square, times the norm of the weights that read it and stay.
    Text goes through no projector: without images the norm of the weights that make a channel stands for its output::

        S_j = rms(X_j) * ||W2_ij over kept i||          S_j = ||W1_j|| * ||W2_ij over kept i||

    Prints the share of importance that stays and, with images, the loss before and after this cut alone.

    Args:
        keep_hidden: the hidden channels that stay.
        channels: how many inner channels stay.
        walk: over the calibration data; None for none.

    Returns:
        Fields of a plan: sorted indices of the channels that stay.
    """
    around = checkpoint.image_text
    if around is None or not around.wrapper.projector or len(keep_hidden) == checkpoint.shape.hidden:
        return {}
    first, second = (_weight(around, f"{module}.weight") for module in around.wrapper.projector)
    outputs, images, before = first.norm(dim=1), None, 0.0
    if isinstance(walk, ImageWalk):  # a walk of its own, since a resumed one may have embedded nothing
        images = ImageWalk(checkpoint, walk.samples, device=walk.device, dtype=walk.dtype, label="measure projector")
        before = images.measure()
        outputs = images.projector.mean_square.sqrt()
    scores = outputs * second[keep_hidden.cpu()].norm(dim=0)
    keep = keep_channels(scores, channels)
    cost = "by weights alone: text does not go through it, so that the loss on images is not known"
    if images:
        images.projector.keep = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, keep, True)
        after = images.measure()
        cost = f"and this cut alone takes the loss on the images' text from {before:.4f} to {after:.4f} nats a token"
    notify(
        f"projector: {channels} of {len(scores)} inner channels stay, since their number is the hidden size; they have "
        f"{percent(float(scores[keep].sum() / scores.sum()))} of the importance, {cost}"
    )
    return {"keep_projector": keep}


def _weight(around: ImageTextModel, module: str) -> Tensor:
    name = next(name for name in around.outside if name.endswith(module))
    return around.outside[name].tensor(name).float()
