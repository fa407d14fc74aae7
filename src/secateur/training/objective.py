"""What training minimises: an objective turns a batch into losses, and may bring parameters of its own.

Every objective is called through the same loop. In evaluation mode each gives the language-model loss, so that held-out
losses of different objectives can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from secateur.losses.next_token import model_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BatchLosses", "LanguageModel", "Objective"]


class BatchLosses(NamedTuple):
    """What a batch comes to."""

    total: Tensor  #: what is minimised, summed over the predicted tokens; differentiable
    each: Tensor  #: its value for each of them, [windows, positions - 1], detached
    once: Tensor | None = None  #: what is minimised besides, once in a step whatever its batches; differentiable


class Objective(nn.Module):
    """A module, so that what it brings is placed, sharded and saved with the model."""

    def begin(self, step: int, steps: int) -> None:
        """Take note that ``step`` of ``steps`` begins; the same in all processes."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of its own parameters; ``peak_rate`` is their peak learning rate, before the schedule."""
        return []

    def figures(self) -> Mapping[str, float]:
        """What is to be written down after a step, besides the loss."""
        return {}

    def note(self) -> str:
        """The same, to be shown."""
        return ""

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """The losses of a batch; see :meth:`secateur.training.parallel.TrainModule.forward`."""
        raise NotImplementedError


class LanguageModel(Objective):
    """The cross-entropy of the token that follows."""

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """The losses in nats, as :func:`secateur.losses.next_token.model_loss` gives them."""
        return BatchLosses(*model_loss(model, ids, position_ids=positions, targets=targets))
