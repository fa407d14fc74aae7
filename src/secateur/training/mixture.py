"""Windows from several domains, in shares that follow their losses: dynamic batch loading (arXiv:2310.06694, 2.2).

A domain with a loss above its reference is read more, other domains less. Shares change only in :meth:`Mixture.update`;
between updates every domain gets its share to within one window. Only the order of windows within a domain is random.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import RunError, UserError
from secateur.training.batches import Batch, Span, Tokens, count_targets, document_names, read_batch
from secateur.training.recipe import Recipe

__all__ = ["Mixture"]

_TINY = 1e-300  # stands for a share of zero: its logarithm is finite


class Mixture:
    """Windows of several domains, equally many in every step; an exhausted domain is read again in a new order.

    At first a domain's share is that of its tokens. With one domain this is a run of any length over few tokens.

    Args:
        store: what the ranges are of, read as ``train``: :class:`secateur.data.domains.DomainTokens`, or any tokens.
        ranges: domain -> its tokens [start, stop); what is left behind the last whole window is not read.
        recipe: windows of ``sequence`` tokens, ``tokens_per_step`` in each step.
        references: domain -> the loss (nats a token) that :meth:`update` compares with; it may be set later.

    Raises:
        UserError: if there is no domain, one has no whole window, or a reference is not finite.
    """

    def __init__(
        self,
        store: Tokens,
        ranges: Mapping[str, Span],
        recipe: Recipe,
        steps: int,
        references: Mapping[str, float] | None = None,
    ) -> None:
        self.store, self.recipe, self.steps = store, recipe, steps
        self.ranges, self.references = dict(ranges), dict(references or {})
        self._names = tuple(self.ranges)
        self._windows = [(stop - start) // recipe.sequence for start, stop in self.ranges.values()]
        if not self._windows or not all(self._windows):
            short = [name for name, windows in zip(self._names, self._windows, strict=True) if not windows]
            where = f"domain {short[0]!r}: " if short and short[0] else ""
            raise UserError(
                f"{where}less than one window of {recipe.sequence} tokens; give more text, or lower sequence"
            )
        for name, loss in self.references.items():
            if not math.isfinite(loss):
                raise UserError(f"the reference loss of domain {name!r} is {loss}; give a finite one")
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # domain -> a pass, and its order
        self._last: tuple[int, list[Span]] = (-1, [])
        self.restore(None)

    @property
    def tokens(self) -> int:
        """Number of tokens in all steps."""
        return self.steps * self.recipe.tokens_per_step

    @property
    def step(self) -> int:
        """The next step."""
        return self._step

    @property
    def weights(self) -> dict[str, float]:
        """Domain -> its share of the next windows; shares sum to one."""
        return dict(zip(self.ranges, self._weights.tolist(), strict=True))

    @property
    def read(self) -> dict[str, int]:
        """Domain -> windows read so far."""
        return dict(zip(self.ranges, self._read, strict=True))

    @property
    def passes(self) -> dict[str, float]:
        """Domain -> number of passes so far; above one, windows were read again."""
        return {name: read / n for (name, read), n in zip(self.read.items(), self._windows, strict=True)}

    def spans(self, step: int) -> list[Span]:
        """The windows of a step, for all processes. Call it for each step in order; the last call may be repeated.

        Each window goes to the domain whose deadline is first, i.e. that would soonest lag a window behind its share,
        among those not a whole window ahead (Pfair scheduling; the first of equals). While shares are constant, no
        domain deviates by a whole window; the largest-remainder rule does not guarantee that.
        """
        if step == self._last[0]:
            return list(self._last[1])
        assert step == self._step, f"got step {step}, but step {self._step} is next"
        spans: list[Span] = []
        for _ in range(self.recipe.tokens_per_step // self.recipe.sequence):
            self._credits += self._weights
            deadlines = np.where(self._credits > 0, (1 - self._credits) / np.maximum(self._weights, _TINY), np.inf)
            domain = int(deadlines.argmin())
            self._credits[domain] -= 1
            spans.append(self._next(domain))
        self._step += 1
        self._last = (step, spans)
        return list(spans)

    def update(self, losses: Mapping[str, float | None]) -> None:
        """Change the shares from the next step on: w <- w exp(max(loss - reference, 0)), normalised.

        A domain without a loss or a reference keeps its share; the others divide the rest.

        Args:
            losses: domain -> nats a token; the same in all processes. Other domains are ignored.

        Raises:
            RunError: if a loss is not finite.
        """
        candidates = {name: losses.get(name) for name in self.ranges if name in self.references}
        measured = {name: loss for name, loss in candidates.items() if loss is not None}
        for name, loss in measured.items():
            if not math.isfinite(loss):
                raise RunError(f"lower peak_rate: the loss of domain {name!r} is {loss}, which gives no share")
        excess = {name: max(loss - self.references[name], 0.0) for name, loss in measured.items()}
        if not any(excess.values()):
            return
        places = [place for place, name in enumerate(self._names) if name in excess]
        before = self._weights[places]
        logs = np.log(np.maximum(before, _TINY)) + list(excess.values())
        after = np.exp(
            np.maximum(logs - logs.max(), math.log(_TINY))
        )  # the largest is one, so that the sum is not zero
        self._weights[places] = before.sum() * after / after.sum()

    def batch(self, spans: Sequence[Span]) -> Batch:
        """Read windows; none give the empty batch."""
        return read_batch(self.store, self.recipe, spans)

    def targets(self, spans: Sequence[Span]) -> int:
        """Number of tokens that windows predict."""
        return count_targets(self.store, spans)

    def documents(self, spans: Sequence[Span], most: int = 1000) -> list[str]:
        """The names of the documents, at most so many, that the windows lie in."""
        return document_names(self.store, spans, most)

    def state(self) -> dict[str, Any]:
        """The next step, references, shares, credits and windows read, as plain values."""
        credits = dict(zip(self.ranges, self._credits.tolist(), strict=True))
        state = {"references": self.references, "weights": self.weights, "credits": credits, "read": self.read}
        return {"step": self._step, **state}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a :meth:`state`; None starts from the beginning.

        Raises:
            UserError: if the state has other domains.
        """
        if state is None:
            sizes = np.array([stop - start for start, stop in self.ranges.values()], dtype=np.float64)
            zeros = dict.fromkeys(self.ranges, 0)
            weights = dict(zip(self.ranges, (sizes / sizes.sum()).tolist(), strict=True))
            state = {"step": 0, "references": self.references, "weights": weights, "credits": zeros, "read": zeros}
        if set(state["weights"]) != set(self.ranges):
            raise UserError("the checkpoint belongs to a run over other domains; write to a new directory")
        self._step, self.references = state["step"], dict(state["references"])
        self._weights = np.array([state["weights"][name] for name in self.ranges], dtype=np.float64)
        self._credits = np.array([state["credits"][name] for name in self.ranges], dtype=np.float64)
        self._read: list[int] = [state["read"][name] for name in self.ranges]
        self._last = (-1, [])

    def _next(self, domain: int) -> Span:
        """The next window of a domain."""
        name, length = self._names[domain], self.recipe.sequence
        number, at = divmod(self._read[domain], self._windows[domain])
        if domain not in self._orders or self._orders[domain][0] != number:
            self._orders[domain] = number, _order(self._windows[domain], f"{self.recipe.data_seed}:{number}:{name}")
        self._read[domain] += 1
        start = self.ranges[name][0] + int(self._orders[domain][1][at]) * length
        return start, start + length


def _order(windows: int, key: str) -> NDArray[np.int64]:
    """The order of one pass over a domain, which follows from its name, the pass and the seed alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(windows, generator=generator).numpy()
