"""Knowledge distillation: the KL divergence of a student from a teacher, in chunks of tokens.

As in :mod:`secateur.losses.next_token`, full logits [tokens, vocabulary] never exist: a chunk's logits become its
losses and gradients at once. With ``s`` and ``t`` the soft-capped logits of student and teacher, ``y`` a token's
target, ``T`` the temperature and ``a`` (alpha) the weight of the divergence (arXiv:1503.02531), for each token::

    p = softmax(t / T), q = softmax(s / T)
    loss     = a T^2 sum_i p_i log(p_i / q_i) + (1 - a) (log sum_i exp(s_i) - s_y)
    dloss/ds = a T (q - p) + (1 - a) (softmax(s) - onehot(y))

With ``top_k`` the categories are the teacher's k likeliest ids, and one for all remaining ids. This equals giving the
remaining ids the student's proportions, ``p_i = q_i * sum p / sum q`` (sums over them), so both formulas still hold.

Memory besides the gradients, for each chunk token and id: 12 bytes; in bfloat16 4 more; with a student's cap 4 more.
"""

from __future__ import annotations

from collections.abc import Callable

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
from secateur.losses.top_k import TopK, log_softmax_, merge_tail_, split_tail_

__all__ = ["summed_divergence"]


def summed_divergence(
    student: Readout,
    teacher: Readout | TopK,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the distillation loss (nats) of the formula above.

    Products use each model's dtype, or autocast's if enabled; the rest is in float32.

    Args:
        student: with the same tokens and vocabulary as the teacher.
        teacher: factors of its logits, which get no gradient; or its likeliest ids at this temperature.
        targets: int64 [tokens], the next ids; ``IGNORE_INDEX`` for no loss.
        temperature: divides the logits of both.
        alpha: weight of the divergence, above 0; the rest is the cross-entropy of the targets.
        top_k: number of the teacher's likeliest ids that are separate categories; None for all, of a :class:`TopK`
            for all that it has.
        chunk: tokens in a chunk; None to suit the device.

    Returns:
        The sum, differentiable once in ``student``, and each token's loss, detached; see
        :func:`secateur.losses.next_token.summed_loss`.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
        RuntimeError: in a second backward pass, or in one with ``create_graph``.
    """
    if isinstance(teacher, Readout) and len(teacher.weight) != len(student.weight):
        raise ValueError(f"vocabularies of {len(student.weight)} and {len(teacher.weight)} ids do not fit")
    length = len(teacher) if isinstance(teacher, TopK) else len(teacher.hidden)
    if not length == len(student.hidden) == len(targets):
        raise ValueError(f"{len(student.hidden)} and {length} states and {len(targets)} targets")
    mask = targets != IGNORE_INDEX
    safe_targets = targets.where(mask, 0)
    if isinstance(teacher, TopK):
        distribution = _saved_distribution(teacher if top_k is None else teacher.first(top_k))
    else:
        distribution = _live_distribution(teacher, temperature, top_k)

    def logit_gradient(part: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, tanh = softcap(logits.float(), student.cap)
        log_softmax_(s, temperature)
        losses = _kl_gradient(s, distribution(part, s), safe_targets[part], temperature, alpha)
        return losses, softcap_backward(s, tanh), torch.ones_like(losses)[:, None]

    return chunked_sum(student.hidden, student.weight, mask, logit_gradient, chunk=chunk)


#: function of a slice of the tokens and of the student's log-probabilities [tokens, vocabulary], which are the same
#: afterwards; returns the teacher's, which may be overwritten
Distribution = Callable[[slice, Tensor], Tensor]


def _live_distribution(teacher: Readout, temperature: float, top_k: int | None) -> Distribution:
    """The distribution of a teacher whose logits are computed chunk by chunk."""
    states, head = to_compute_dtype(teacher.hidden.detach()), to_compute_dtype(teacher.weight.detach())
    top_k = top_k if top_k is not None and top_k < len(head) else None  # with all ids nothing remains to merge

    def log_p(part: slice, log_q: Tensor) -> Tensor:
        logits = make_logits(states[part], head, states.new_empty(log_q.shape))
        t, _ = softcap(logits.float(), teacher.cap)
        log_softmax_(t, temperature)
        if top_k is not None:
            merge_tail_(log_q, split_tail_(t, top_k), t)
        return t

    return log_p


def _saved_distribution(top: TopK) -> Distribution:
    """The distribution of a teacher of which the likeliest ids are there."""

    def log_p(part: slice, log_q: Tensor) -> Tensor:
        t = torch.empty_like(log_q)
        merge_tail_(log_q, top[part], t)
        return t

    return log_p


def _kl_gradient(log_q: Tensor, log_p: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """Return losses [tokens]; ``log_q`` becomes their gradient in the student's logits, ``log_p`` is overwritten."""
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(dim=1).mul_(alpha * temperature**2)
    if alpha == 1:
        log_q.exp_().sub_(p).mul_(temperature)
        return losses
    logits = torch.mul(log_q, temperature, out=log_p)  # up to a constant for each token, which softmax ignores
    log_q.exp_().sub_(p).mul_(alpha * temperature)
    entropies, scale = cross_entropy_gradient(logits, targets)
    log_q.addcmul_(logits, scale, value=1 - alpha)
    return losses.add_(entropies, alpha=1 - alpha)
