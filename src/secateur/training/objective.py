"""Training objectives: an objective turns a batch into losses, and may have parameters.

All objectives go through one training loop. In evaluation mode each returns the language-model loss, so that held-out
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
    """The losses of a batch."""

    total: Tensor  #: loss to minimise, summed over the predicted tokens; differentiable
    each: Tensor  #: loss of each predicted token, [windows, positions - 1], detached
    once: Tensor | None = None  #: loss that counts once in a step, however many batches it has; differentiable


class Objective(nn.Module):
    """A loss. As a module, its parameters are placed, sharded and saved with the model."""

    def begin(self, step: int, steps: int) -> None:
        """Prepare for ``step`` of ``steps``; called in all processes."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the objective's parameters; ``peak_rate`` is a group's peak learning rate."""
        return []

    def figures(self) -> Mapping[str, float]:
        """Numbers to record after a step, besides the loss."""
        return {}

    def note(self) -> str:
        """The same numbers as text for the progress line."""
        return ""

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """The losses of a batch; see :meth:`secateur.training.parallel.TrainModule.forward`."""
        raise NotImplementedError


class LanguageModel(Objective):
    """The cross-entropy of the next token."""

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """The losses in nats, as :func:`secateur.losses.next_token.model_loss` gives them."""
        return BatchLosses(*model_loss(model, ids, position_ids=positions, targets=targets))
