"""The end of the model, in chunks of the vocabulary: losses, and their gradients, without the logits of all tokens.

Neither the head in float32 nor logits [tokens, vocabulary] are ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.model.checkpoint import Checkpoint

__all__ = ["LMHead"]

_VALUES = 2**24  # of the head in float32 at once
_TOKENS = 2**14  # of the vocabulary at once, at most


class LMHead:
    """The final norm and the matrix that turns states into logits.

    Args:
        checkpoint: where the head lies.
        norm: the final norm, its weight loaded.
        device: where to compute.
    """

    def __init__(self, checkpoint: Checkpoint, norm: nn.Module, device: str) -> None:
        self.checkpoint, self.norm, self.device = checkpoint, norm, device
        self.cap: float | None = None  #: what some families bound logits by
        if key := checkpoint.family.logit_cap:
            self.cap = getattr(checkpoint.config, key, None)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The head's rows, float32 [tokens of the vocabulary, hidden], each with the first one's id."""
        name, shape = self.checkpoint.family.head, self.checkpoint.shape
        step = max(1, min(_TOKENS, _VALUES // shape.hidden))
        for start in range(0, shape.vocabulary, step):
            rows = self.checkpoint.rows(name, start, min(start + step, shape.vocabulary))
            self.checkpoint.check_finite(name, rows)
            yield start, rows.to(self.device, torch.float32)

    @torch.no_grad()
    def losses(self, ids: Sequence[Tensor], sets: Sequence[Sequence[Tensor]]) -> list[float]:
        """The summed next-token loss (nats) of each set of states that left the last block.

        Args:
            ids: token ids [windows, positions], batch by batch.
            sets: states [windows, positions, hidden], batch by batch, of each model that is measured.
        """
        found = self._log_partitions(ids, sets)
        return [sum(float((z - y).double().sum()) for z, y in zip(*pair, strict=True)) for pair in found]

    def _log_partitions(
        self, ids: Sequence[Tensor], sets: Sequence[Sequence[Tensor]]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """For each set: log of the sum of exponentials, and the target's logit, [targets], window by window."""
        windows = [window for batch in ids for window in batch]
        found = []
        for _ in sets:
            partition = [torch.full((len(w) - 1,), -torch.inf, device=self.device) for w in windows]
            found.append((partition, [torch.zeros_like(p) for p in partition]))
        for start, rows in self.chunks():
            for states, (partition, reached) in zip(sets, found, strict=True):
                for i, (window, hidden) in enumerate(zip(windows, _each(states), strict=True)):
                    logits = self.logits(hidden, rows)
                    partition[i] = torch.logaddexp(partition[i], logits.logsumexp(dim=1))
                    at, inside = self._targets(window, start, len(rows))
                    reached[i][inside] = logits[inside, at[inside]]
        return found

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of a window's states [positions, hidden] for some of the vocabulary: [positions - 1, tokens]."""
        return self.cap_logits(self.norm(hidden[:-1].to(self.device)).float() @ rows.T)

    def cap_logits(self, logits: Tensor) -> Tensor:
        """The logits as the model puts them out."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _targets(self, window: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        at = window[1:].to(self.device) - start
        return at, (at >= 0) & (at < count)

    @torch.no_grad()
    def gradients(self, ids: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each window's mean loss with respect to its last states, batches of one window.

        ``dL/dz = (softmax(z) - onehot) / targets``, carried back through the cap, the head and the norm.
        """
        ((partitions, _),) = self._log_partitions(ids, [states])
        behind = [torch.zeros_like(hidden[0, :-1], dtype=torch.float32, device=self.device) for hidden in states]
        for start, rows in self.chunks():
            for window, hidden, partition, gradient in zip(_each(ids), _each(states), partitions, behind, strict=True):
                logits = self.logits(hidden, rows)
                slope = torch.exp(logits - partition[:, None])
                at, inside = self._targets(window, start, len(rows))
                slope[inside, at[inside]] -= 1
                if self.cap is not None:
                    slope *= 1 - (logits / self.cap).square()
                gradient.addmm_(slope, rows, alpha=1 / len(partition))
        return [self._through_norm(hidden, gradient) for hidden, gradient in zip(states, behind, strict=True)]

    def _through_norm(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        hidden = hidden.to(self.device).detach().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.norm(hidden[:, :-1]).float(), hidden, gradient[None])
        return found


def _each(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The windows of all batches, one after the other."""
    for batch in batches:
        yield from batch
