"""Losses and their gradients from the last states, in chunks of the vocabulary.

Neither the head in float32 nor the logits [tokens, vocabulary] are ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.losses.next_token import IGNORE_INDEX
from secateur.model.checkpoint import Checkpoint

__all__ = ["LMHead"]

_VALUES = 2**24  #: values of the head in a chunk
_TOKENS = 2**14  #: most tokens of the vocabulary in a chunk


class LMHead:
    """The final norm and the matrix that turns states into logits."""

    def __init__(self, checkpoint: Checkpoint, norm: nn.Module, device: str) -> None:
        self.checkpoint, self.norm, self.device = checkpoint, norm, device
        family, config = checkpoint.family, checkpoint.config
        self.cap = family.cap(config)  #: bound on logits, in some families
        self.scale = family.logit_scale(config)  #: factor of logits before the cap

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield chunks of the head, float32 [tokens of the vocabulary, hidden], each with the id of its first token.

        With a bias the rows are one longer: :meth:`inputs` puts the scale there.
        """
        name, shape = self.checkpoint.family.head, self.checkpoint.shape
        step = max(1, min(_TOKENS, _VALUES // shape.hidden))
        for start in range(0, shape.vocabulary, step):
            rows = self.checkpoint.rows(name, start, min(start + step, shape.vocabulary))
            self.checkpoint.check_finite(name, rows)
            rows = rows.to(self.device, torch.float32)
            if bias := self.checkpoint.shape.head_bias:
                column = self.checkpoint.rows(bias, start, start + len(rows))
                self.checkpoint.check_finite(bias, column)
                rows = torch.cat([rows, column.to(rows)[:, None]], 1)
            yield start, rows

    @torch.no_grad()
    def losses(self, ids: Sequence[Tensor], sets: Sequence[Sequence[Tensor]]) -> list[float]:
        """The summed next-token loss (nats) of each set of last states.

        Args:
            ids: token ids [windows, positions], batch by batch; ``IGNORE_INDEX`` for a token without loss.
            sets: for each model, its states [windows, positions, hidden], batch by batch.
        """
        pairs = self._log_partitions(ids, sets)
        targets = [window[1:].to(self.device) != IGNORE_INDEX for batch in ids for window in batch]
        return [sum(float((z - y)[t].double().sum()) for z, y, t in zip(*pair, targets, strict=True)) for pair in pairs]

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
        return self.cap_logits(self.inputs(hidden[:-1].to(self.device)) @ rows.T)

    def inputs(self, hidden: Tensor) -> Tensor:
        """What the rows of :meth:`chunks` multiply: the normed states in float32, scaled; and the scale for a bias."""
        states = self.norm(hidden[..., : self.checkpoint.shape.hidden]).float()  # keys and values may lie behind
        states = states if self.scale == 1 else states * self.scale
        return (
            states if self.checkpoint.shape.head_bias is None else nn.functional.pad(states, (0, 1), value=self.scale)
        )

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
        width = self.checkpoint.shape.hidden + (self.checkpoint.shape.head_bias is not None)
        gradients = [torch.zeros(hidden.shape[1] - 1, width, device=self.device) for hidden in states]
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
            (downstream,) = torch.autograd.grad(self.inputs(hidden[:, :-1]), hidden, gradient[None])
        return downstream


def _windows(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The windows of all batches, one after the other."""
    for batch in batches:
        yield from batch
