"""Next-token cross-entropy from hidden states and the head, in chunks of tokens.

Logits [tokens, vocabulary] are never held: at 128k ids, those of 8,192 tokens are 4 GB in float32, and the plain way
holds them three times (themselves, their log-softmax, their gradient). Here each chunk's logits become, in place, the
gradient of its loss, and the gradients of hidden states and head are taken from that at once. So there are as many
matrix products as in the plain way, two of which move from the backward pass to the forward pass.

With ``z`` a token's logits, ``y`` its target, and logits bent to ``c tanh(z / c)`` where the family has a cap::

    loss     = log sum_i exp(z_i) - z_y
    dloss/dz = softmax(z) - onehot(y), and through the cap times 1 - tanh(z / c)^2

Memory besides the gradients, in values of a chunk times the vocabulary: one of 4 bytes; in bfloat16, one of 2 bytes
and one of 4; with a cap, one of 4 more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from secateur.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IGNORE_INDEX", "Readout", "chunked_sum", "model_loss", "readout", "summed_loss"]

IGNORE_INDEX = -100  #: a target that is not counted

_CUDA_VALUES = 2**24  # logits at once on a GPU: enough to fill it
_LEAST = 16  # tokens at once, at least: every chunk reads the whole head and its whole gradient
_CPU_TOKENS = 256  # tokens at once elsewhere; fewer are slower, more are not faster (4k to 128k ids)
_TILE = {"cuda": 2**26}  # values of the head in one product
_CPU_TILE = 2**18  # what a core's cache holds: whole products of the head are up to half slower


def model_loss(
    model: PreTrainedModel, ids: Tensor, *, position_ids: Tensor | None = None, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next-token losses (nats) of a causal language model of the known families.

    Args:
        model: with or without tied embeddings.
        ids: int64 [windows, positions].
        position_ids: int64 [windows, positions]; None for 0, 1, 2 ...
        targets: int64 [windows, positions - 1], what each position but the last should predict, ``IGNORE_INDEX`` where
            that does not count; None for the next id.

    Returns:
        The sum, differentiable in the parameters, and each loss, [windows, positions - 1]; see :func:`summed_loss`.

    Raises:
        UserError: if the family is unknown.
    """
    targets = ids[:, 1:] if targets is None else targets
    hidden, weight, cap = readout(model, ids, position_ids)
    total, losses = summed_loss(hidden, weight, targets.flatten(), cap=cap)
    return total, losses.view(targets.shape)


class Readout(NamedTuple):
    """What logits are made of: ``hidden @ weight.T``, bent by the cap."""

    hidden: Tensor  #: what the head reads, [tokens, hidden]
    weight: Tensor  #: the head, [vocabulary, hidden]
    cap: float | None = None


def readout(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None) -> Readout:
    """What a model's logits at all positions but each window's last are made of.

    The decoder and the head are called apart, so hooks on ``model`` itself do not run; those on the decoder do.

    Args:
        model: of a known family.
        ids: int64 [windows, positions].
        position_ids: of the same size; None for 0, 1, 2 ...

    Raises:
        UserError: if the family is unknown.
    """
    family = family_of(model.config.model_type, where="the model")
    cap = getattr(model.config, family.logit_cap, None) if family.logit_cap else None
    states = model.get_decoder()(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    # The last state predicts nothing. To leave it out costs a copy of the states, which is less than its logits.
    return Readout(states[:, :-1].flatten(0, 1), head.weight, cap)


def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy (nats) of ``softmax(hidden @ weight.T)``, without logits of all tokens.

    Products are in the tensors' type, or in autocast's where that is on; softmax and sums are in float32. Gradients
    are computed here, in the forward pass, for whichever of ``hidden`` and ``weight`` requires one and unless gradients
    are off. The backward pass hands them out without a copy: it goes through once, with ``retain_graph`` too.

    Args:
        hidden: what the head reads, [tokens, hidden], float32 or bfloat16.
        weight: the head, [vocabulary, hidden], of the same type.
        targets: int64 [tokens]; ``IGNORE_INDEX`` where a token does not count.
        cap: bounds logits to ``cap * tanh(logits / cap)``.
        chunk: tokens at once; None for what suits the device.

    Returns:
        The sum, a float32 scalar, differentiable once in ``hidden`` and ``weight``; and each token's loss, float32
        [tokens], detached, zero where ignored.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
        RuntimeError: in a second backward pass, or in one with ``create_graph``.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {[*targets.shape]} do not fit hidden {[*hidden.shape]}")
    counted = targets != IGNORE_INDEX
    reached = targets.where(counted, 0)
    return chunked_sum(hidden, weight, counted, lambda part, logits: _slopes(logits, reached[part], cap), chunk=chunk)


#: of some tokens, and their logits [tokens, vocabulary], which it may overwrite: each one's loss, and the gradients by
#: the logits as ``slopes * shares``, [tokens, vocabulary] and [tokens, 1]
LogitGradient = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]


def chunked_sum(
    hidden: Tensor, weight: Tensor, counted: Tensor, slopes: LogitGradient, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of a loss of the logits ``hidden @ weight.T``, a chunk of tokens at a time; see :func:`summed_loss`.

    Args:
        hidden: what the head reads, [tokens, hidden].
        weight: the head, [vocabulary, hidden].
        counted: bool [tokens].
        slopes: gives a chunk's losses and gradients; it is called with autocast and gradients off.
        chunk: tokens at once; None for what suits the device.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} do not fit")
    if chunk is None:
        chunk = _pick_chunk(len(hidden), len(weight), hidden.device.type)
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is not positive")
    # Whether gradients are on cannot be seen inside of an autograd function, where they are always off.
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _SummedLoss.apply(hidden, weight, counted, slopes, chunk, wanted)


def _pick_chunk(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens at once: as many in each chunk, since a short last one costs nearly as much as a whole one."""
    chunk = max(_LEAST, _CUDA_VALUES // vocabulary) if device == "cuda" else _CPU_TOKENS
    return max(1, -(-tokens // max(1, round(tokens / chunk))))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        counted: Tensor,
        slopes: LogitGradient,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtypes = hidden.dtype, weight.dtype
        hidden, weight = to_compute_dtype(hidden), to_compute_dtype(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            losses, *found = _losses(hidden, weight, counted, slopes, chunk, wanted)
        ctx.gradients = [None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would let create_graph pass, and its gradients lack a part without a word.
        if torch.is_grad_enabled():
            raise RuntimeError("summed_loss has no second derivative: go back through it without create_graph")
        if ctx.gradients is None:
            raise RuntimeError("summed_loss was gone back through already, and keeps no gradients: call it again")
        found, ctx.gradients = ctx.gradients, None  # a gradient that nobody else holds becomes .grad without a copy
        return (*(None if g is None else g.mul_(grad_outputs[0]) for g in found), None, None, None, None)


def to_compute_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the type in which a product with it is computed: autocast's, where that is on."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _losses(
    hidden: Tensor, weight: Tensor, counted: Tensor, slopes: LogitGradient, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's loss, and the gradients of their sum: of ``hidden`` in its type, of ``weight`` in float32."""
    losses = torch.empty(counted.shape, dtype=torch.float32, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    space = hidden.new_empty(min(chunk, len(hidden)), len(weight))
    for part in _slices(len(hidden), chunk):
        states = hidden[part]
        logits = make_logits(states, weight, space[: len(states)])
        losses[part], found, shares = slopes(part, logits)
        shares.masked_fill_(~counted[part, None], 0)
        if found is not logits:
            found = logits.copy_(found)
        if of_hidden is not None:
            torch.mm(found, weight, out=of_hidden[part])
            of_hidden[part].mul_(shares)
        if of_weight is not None:
            _add_product(of_weight, found, (states * shares).to(states.dtype))
    return losses.masked_fill_(~counted, 0), of_hidden, of_weight


def make_logits(states: Tensor, weight: Tensor, space: Tensor) -> Tensor:
    """``states @ weight.T`` [tokens, vocabulary], written into ``space``."""
    for rows in _tiles(weight):
        torch.mm(states, weight[rows].T, out=space[:, rows])
    return space


def _slopes(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [tokens], and their gradients by the logits as ``slopes * shares``, [tokens, vocabulary] and [tokens, 1].

    The shares, one over the sum of exponentials, are kept apart: to scale a token's states is cheaper than to scale
    what it has for each id. Float32 logits are overwritten.
    """
    z, bent = softcap(logits.float(), cap)
    losses, shares = cross_entropy_gradient(z, targets)
    return losses, softcap_backward(z, bent), shares


def cross_entropy_gradient(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [tokens] and shares [tokens, 1] of the cross-entropy of float32 ``z``, which becomes its slopes."""
    targets = targets[:, None]
    z.sub_(z.amax(dim=1, keepdim=True))
    at_target = z.gather(1, targets)
    sums = z.exp_().sum(dim=1, keepdim=True)
    z.scatter_add_(1, targets, -sums)
    return (sums.log() - at_target)[:, 0], sums.reciprocal()


def softcap(z: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return ``cap * tanh(z / cap)``, and the tanh for :func:`softcap_backward`; ``z`` is overwritten.

    Without a cap, return ``z`` itself and None.
    """
    if cap is None:
        return z, None
    bent = z.div_(cap).tanh_()
    return bent * cap, bent


def softcap_backward(slopes: Tensor, bent: Tensor | None) -> Tensor:
    """Take gradients by bent logits, in place, to those by the logits themselves; ``bent`` is overwritten."""
    return slopes if bent is None else slopes.mul_(bent.square_().neg_().add_(1))


def _add_product(total: Tensor, slopes: Tensor, states: Tensor) -> None:
    """Add ``slopes.T @ states`` [vocabulary, hidden] to the float32 ``total``."""
    for rows in _tiles(total):
        if states.dtype == total.dtype:
            total[rows].addmm_(slopes[:, rows].T, states)
        else:
            total[rows].add_(slopes[:, rows].T @ states)


def _tiles(matrix: Tensor) -> Iterator[slice]:
    """The rows of the head, or of its gradient, some at a time."""
    return _slices(len(matrix), max(1, _TILE.get(matrix.device.type, _CPU_TILE) // matrix.shape[1]))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
