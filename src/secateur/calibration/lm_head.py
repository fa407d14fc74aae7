"""Losses and their gradients from the last states, in chunks of the vocabulary.

Neither the head in float32 nor the logits [tokens, vocabulary] are ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.model.checkpoint import Checkpoint

__all__ = ["LMHead"]

_VALUES = 2**24  #: values of the head in a chunk
_TOKENS = 2**14  #: most tokens of the vocabulary in a chunk


class LMHead:
    """The final norm and the matrix that turns states into logits."""

    def __init__(self, checkpoint: Checkpoint, norm: nn.Module, device: str) -> None:
        self.checkpoint, self.norm, self.device = checkpoint, norm, device
        self.cap: float | None = None  #: bound on logits, in some families
        if key := checkpoint.family.logit_cap:
            self.cap = getattr(checkpoint.config, key, None)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield chunks of the head, float32 [tokens of the vocabulary, hidden], each with the id of its first token."""
        name, shape = self.checkpoint.family.head, self.checkpoint.shape
        step = max(1, min(_TOKENS, _VALUES // shape.hidden))
        for start in range(0, shape.vocabulary, step):
            rows = self.checkpoint.rows(name, start, min(start + step, shape.vocabulary))
            self.checkpoint.check_finite(name, rows)
            yield start, rows.to(self.device, torch.float32)

    @torch.no_grad()
    def losses(self, ids: Sequence[Tensor], sets: Sequence[Sequence[Tensor]]) -> list[float]:
        """The summed next-token loss (nats) of each set of last states.

        Args:
            ids: token ids [windows, positions], batch by batch.
            sets: for each model, its states [windows, positions, hidden], batch by batch.
        """
        pairs = self._log_partitions(ids, sets)
        return [sum(float((z - y).double().sum()) for z, y in zip(*pair, strict=True)) for pair in pairs]

    def _log_partitions(
        self, ids: Sequence[Tensor], sets: Sequence[Sequence[Tensor]]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For each set: the log of the sum of exponentials and the target's logit, both [targets], window by window."""
        windows = [window for batch in ids for window in batch]
        pairs = []
        for _ in sets:
            partition = [torch.full((len(w) - 1,), -torch.inf, device=self.device) for w in windows]
            pairs.append((partition, [torch.zeros_like(p) for p in partition]))
        for start, rows in self.chunks():
            for states, (partition, target_logits) in zip(sets, pairs, strict=True):
                for i, (window, hidden) in enumerate(zip(windows, _windows(states), strict=True)):
                    logits = self.logits(hidden, rows)
                    partition[i] = torch.logaddexp(partition[i], logits.logsumexp(dim=1))
                    target, inside = self._targets(window, start, len(rows))
                    target_logits[i][inside] = logits[inside, target[inside]]
        return pairs

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of a window's states [positions, hidden] for some of the vocabulary: [positions - 1, tokens]."""
        return self.cap_logits(self.norm(hidden[:-1].to(self.device)).float() @ rows.T)

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Apply the bound on logits, if the family has one."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _targets(self, window: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Each target's row within a chunk of ``count`` tokens from ``start``, and whether it lies in the chunk."""
        row = window[1:].to(self.device) - start
        return row, (row >= 0) & (row < count)

    @torch.no_grad()
    def gradients(self, ids: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each window's mean loss with respect to its last states; batches are of one window.

        ``dL/dz = (softmax(z) - onehot) / targets``, carried back through the cap, the head and the norm.
        """
        ((partitions, _),) = self._log_partitions(ids, [states])
        gradients = [torch.zeros_like(hidden[0, :-1], dtype=torch.float32, device=self.device) for hidden in states]
        for start, rows in self.chunks():
            per_window = zip(_windows(ids), _windows(states), partitions, gradients, strict=True)
            for window, hidden, partition, gradient in per_window:
                logits = self.logits(hidden, rows)
                slope = torch.exp(logits - partition[:, None])
                target, inside = self._targets(window, start, len(rows))
                slope[inside, target[inside]] -= 1
                if self.cap is not None:
                    slope *= 1 - (logits / self.cap).square()
                gradient.addmm_(slope, rows, alpha=1 / len(partition))
        return [self._norm_backward(hidden, gradient) for hidden, gradient in zip(states, gradients, strict=True)]

    def _norm_backward(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        hidden = hidden.to(self.device).detach().requires_grad_()
        with torch.enable_grad():
            (downstream,) = torch.autograd.grad(self.norm(hidden[:, :-1]).float(), hidden, gradient[None])
        return downstream


def _windows(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The windows of all batches, one after the other."""
    for batch in batches:
        yield from batch
