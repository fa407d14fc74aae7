"""The divergence of a student's next-token distribution from a teacher's, in chunks of tokens.

As in :mod:`secateur.losses.next_token`, no model's logits [tokens, vocabulary] are ever held: those of a chunk become
its losses and its gradients at once. With ``s`` and ``t`` the logits of student and teacher, bent by their caps, ``y``
a token's target, ``T`` the temperature and ``a`` (alpha) the divergence's share (arXiv:1503.02531), for each token::

    p = softmax(t / T), q = softmax(s / T)
    loss     = a T^2 sum_i p_i log(p_i / q_i) + (1 - a) (log sum_i exp(s_i) - s_y)
    dloss/ds = a T (q - p) + (1 - a) (softmax(s) - onehot(y))

With ``top_k`` the categories are the teacher's k likeliest ids, and one for all others together. That is the same as to
give the others the student's proportions, ``p_i = q_i * sum p / sum q`` (sums over the others), and both formulas above
hold as they stand.

Memory besides the gradients, in values of a chunk times the vocabulary: three of 4 bytes; in bfloat16, two of 2 bytes
more; with a cap of the student's, one of 4 more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.losses.next_token import (
    IGNORE_INDEX,
    Readout,
    chunked_sum,
    cross_entropy_gradient,
    make_logits,
    softcap,
    softcap_backward,
    to_compute_dtype,
)

__all__ = ["summed_divergence"]


def summed_divergence(
    student: Readout,
    teacher: Readout,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss (nats) of a student before a teacher, as above.

    Products are in each model's type, or in autocast's where that is on; the rest is in float32.

    Args:
        student: with the same tokens and vocabulary as the teacher.
        teacher: gets no gradient.
        targets: int64 [tokens], the next ids; ``IGNORED`` where a token counts in neither part.
        temperature: that both distributions are softened by.
        alpha: share of the divergence, above 0; the rest is the cross-entropy of the targets.
        top_k: how many of the teacher's likeliest ids count apart; None for all.
        chunk: tokens at once; None for what suits the device.

    Returns:
        The sum, differentiable once in ``student``, and each token's loss, detached; as
        :func:`secateur.losses.next_token.summed_loss` gives them.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
        RuntimeError: in a second backward pass, or in one with ``create_graph``.
    """
    if len(teacher.weight) != len(student.weight):
        raise ValueError(f"vocabularies of {len(student.weight)} and {len(teacher.weight)} ids do not fit")
    if not len(teacher.hidden) == len(student.hidden) == len(targets):
        raise ValueError(f"{len(student.hidden)} and {len(teacher.hidden)} states and {len(targets)} targets")
    counted = targets != IGNORE_INDEX
    reached = targets.where(counted, 0)
    states, head = to_compute_dtype(teacher.hidden.detach()), to_compute_dtype(teacher.weight.detach())
    top_k = top_k if top_k is not None and top_k < len(head) else None  # of all ids nothing is left to put together

    def slopes(part: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theirs = make_logits(states[part], head, states.new_empty(logits.shape))
        t, _ = softcap(theirs.float(), teacher.cap)
        s, bent = softcap(logits.float(), student.cap)
        for z in (s, t):
            _to_log_shares(z, temperature)
        if top_k is not None:
            _share_out(t, s, top_k)
        losses = _diverge(s, t, reached[part], temperature, alpha)
        return losses, softcap_backward(s, bent), torch.ones_like(losses)[:, None]

    return chunked_sum(student.hidden, student.weight, counted, slopes, chunk=chunk)


def _to_log_shares(z: Tensor, temperature: float) -> None:
    """Logits [tokens, vocabulary] -> the logarithms of their softmax, softened, in place."""
    if temperature != 1:
        z.div_(temperature)
    z.sub_(z.logsumexp(dim=1, keepdim=True))


def _share_out(log_p: Tensor, log_q: Tensor, top_k: int) -> None:
    """Give the teacher's ids but its ``top_k`` likeliest the student's proportions, their sum unchanged, in place."""
    top = log_p.topk(top_k, dim=1)
    kept = log_q.gather(1, top.indices)
    for z in (log_p, log_q):
        z.scatter_(1, top.indices, -torch.inf)
    rest = log_p.logsumexp(dim=1, keepdim=True) - log_q.logsumexp(dim=1, keepdim=True)
    log_q.scatter_(1, top.indices, kept)
    torch.add(log_q, rest, out=log_p)
    log_p.scatter_(1, top.indices, top.values)


def _diverge(log_q: Tensor, log_p: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """Losses [tokens]; ``log_q`` becomes their gradient by the student's logits, and ``log_p`` is overwritten."""
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(dim=1).mul_(alpha * temperature**2)
    if alpha == 1:
        log_q.exp_().sub_(p).mul_(temperature)
        return losses
    logits = torch.mul(log_q, temperature, out=log_p)  # but for a constant of each token, which softmax does not see
    log_q.exp_().sub_(p).mul_(alpha * temperature)
    entropies, shares = cross_entropy_gradient(logits, targets)
    log_q.addcmul_(logits, shares, value=1 - alpha)
    return losses.add_(entropies, alpha=1 - alpha)
