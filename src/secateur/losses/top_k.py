"""A teacher's distribution reduced to its likeliest ids: k ids with their log-probabilities, and the remaining mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.losses.next_token import Readout, make_logits, softcap, to_compute_dtype, token_chunks

__all__ = ["TopK", "log_softmax_", "merge_tail_", "split_tail_", "top_k_of"]


@dataclass(frozen=True)
class TopK:
    """The likeliest ids of each token, in descending order of probability, and one category for all other ids.

    It is no tuple, so that FSDP does not convert its tensors to the type that blocks compute in.
    """

    ids: Tensor  #: int64 [tokens, k]
    log_probs: Tensor  #: float32 [tokens, k]
    log_rest: Tensor  #: float32 [tokens, 1], of the mass of all other ids; -inf where there is none

    def __getitem__(self, part: slice) -> TopK:
        return TopK(self.ids[part], self.log_probs[part], self.log_rest[part])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Number of ids that are separate categories."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> TopK:
        """The same values on another device."""
        return TopK(*(t.to(device, non_blocking=True) for t in (self.ids, self.log_probs, self.log_rest)))

    def first(self, k: int) -> TopK:
        """The k likeliest ids alone; the mass of the others joins the rest."""
        if k >= self.k:
            return self
        rest = torch.cat([self.log_probs[:, k:], self.log_rest], dim=1).logsumexp(dim=1, keepdim=True)
        return TopK(self.ids[:, :k], self.log_probs[:, :k], rest)


def log_softmax_(z: Tensor, temperature: float) -> None:
    """Turn logits [tokens, vocabulary] into log-softmax at a temperature, in place."""
    if temperature != 1:
        z.div_(temperature)
    z.sub_(z.logsumexp(dim=1, keepdim=True))


def split_tail_(log_p: Tensor, k: int) -> TopK:
    """Split log-probabilities [tokens, vocabulary] into the k likeliest ids and the rest; ``log_p`` is overwritten."""
    top = log_p.topk(k, dim=1)
    log_p.scatter_(1, top.indices, -torch.inf)
    return TopK(top.indices, top.values, log_p.logsumexp(dim=1, keepdim=True))


def merge_tail_(log_q: Tensor, top: TopK, out: Tensor) -> None:
    """Write a distribution into ``out`` that equals ``top``, with the proportions of ``log_q`` among all other ids.

    Args:
        log_q: log-probabilities [tokens, vocabulary]; unchanged in the end.
        out: of the same size.
    """
    top_log_q = log_q.gather(1, top.ids)
    log_q.scatter_(1, top.ids, -torch.inf)
    rest = top.log_rest - log_q.logsumexp(dim=1, keepdim=True)
    log_q.scatter_(1, top.ids, top_log_q)
    torch.add(log_q, rest, out=out)
    out.scatter_(1, top.ids, top.log_probs)


def top_k_of(readout: Readout, k: int, *, temperature: float = 1.0) -> TopK:
    """Compute the likeliest ids of ``softmax(logits / temperature)``, in chunks of tokens.

    Logits of all tokens never exist. Products use the tensors' dtype, the rest is in float32. No gradient.

    Args:
        readout: factors of the logits of each token.
        k: number of ids, at most the vocabulary.

    Raises:
        ValueError: if ``k`` is not between 1 and the vocabulary.
    """
    states, head = to_compute_dtype(readout.hidden.detach()), to_compute_dtype(readout.weight.detach())
    if not 1 <= k <= len(head):
        raise ValueError(f"{k} of {len(head)} ids")
    space: Tensor | None = None
    parts = []
    for part in token_chunks(len(states), len(head), states.device.type):
        if space is None:
            space = states.new_empty(part.stop - part.start, len(head))
        logits = make_logits(states[part], head, space[: part.stop - part.start])
        log_p, _ = softcap(logits.float(), readout.cap)
        log_softmax_(log_p, temperature)
        parts.append(split_tail_(log_p, k))
    columns = zip(*((top.ids, top.log_probs, top.log_rest) for top in parts), strict=True)
    return TopK(*(torch.cat(column) for column in columns))
