"""Next-token cross-entropy from hidden states and the head, in chunks of tokens.

The full logits [tokens, vocabulary] never exist: with 128k ids, those of 8,192 tokens take 4 GB in float32, and the
direct computation needs three such tensors (logits, log-softmax, gradient). Here each chunk's logits are overwritten by
the gradient of its loss, from which the gradients of hidden states and head follow at once. The number of matrix
products is the same; two of them move from the backward pass to the forward pass.

With ``z`` a token's logits, ``y`` its target, and logits soft-capped to ``c tanh(z / c)`` in families with a cap::

    loss     = log sum_i exp(z_i) - z_y
    dloss/dz = softmax(z) - onehot(y), and through the cap times 1 - tanh(z / c)^2

Memory besides the gradients, for each chunk token and id: 4 bytes; in bfloat16 6 bytes; with a cap 4 more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.model.families import family_of
from secateur.model.shapes import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "IGNORE_INDEX",
    "Readout",
    "chunked_sum",
    "head_factors",
    "model_loss",
    "readout",
    "summed_loss",
    "token_chunks",
]

IGNORE_INDEX = -100  #: target of a token without loss

_CUDA_VALUES = 2**24  # logits at once on a GPU: enough to fill it
_MIN_CHUNK = 16  # tokens: every chunk reads the whole head and its whole gradient
_CPU_TOKENS = 256  # tokens in a chunk; fewer are slower, more are not faster (4k to 128k ids)
_TILE = {"cuda": 2**26}  # values of the head in one product
_CPU_TILE = 2**18  # what a core's cache holds: whole products of the head are up to half slower


def model_loss(
    model: PreTrainedModel, ids: Tensor, *, position_ids: Tensor | None = None, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the next-token losses (nats) of a causal language model.

    Args:
        model: with or without tied embeddings.
        ids: int64 [windows, positions].
        position_ids: int64 [windows, positions]; None for 0, 1, 2 ...
        targets: int64 [windows, positions - 1], the id to predict at each position but the last, or ``IGNORE_INDEX``
            for no loss; None for the next id.

    Returns:
        The sum, differentiable in the parameters, and the losses [windows, positions - 1]; see :func:`summed_loss`.

    Raises:
        UserError: if the family is unknown.
    """
    targets = ids[:, 1:] if targets is None else targets
    hidden, weight, cap = readout(model, ids, position_ids)
    total, losses = summed_loss(hidden, weight, targets.flatten(), cap=cap)
    return total, losses.view(targets.shape)


class Readout(NamedTuple):
    """The factors of the logits ``hidden @ weight.T``."""

    hidden: Tensor  #: input of the head, [tokens, hidden]
    weight: Tensor  #: the head, [vocabulary, hidden]
    cap: float | None = None  #: of the logits, see :func:`softcap`


def readout(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None = None) -> Readout:
    """Return the factors of a model's logits at all positions but each window's last.

    The decoder is called directly: hooks on ``model`` itself do not run, hooks on the decoder do.

    Args:
        model: of a known family.
        ids: int64 [windows, positions].
        position_ids: of the same size; None for 0, 1, 2 ...

    Raises:
        UserError: if the family is unknown.
    """
    family = family_of(model.config.model_type, where="the model")
    config = model.config
    decoder: Any = model.get_decoder()
    if position_ids is not None and Shape.of_config(config, where="the model").carries_state:
        states = _states_of_documents(decoder, ids, position_ids)
    else:
        states = decoder(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    # The last state predicts nothing. Dropping it copies the states, which costs less than its logits.
    return head_factors(states[:, :-1].flatten(0, 1), head, family.logit_scale(config), family.cap(config))


def _states_of_documents(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Last states [windows, positions, hidden] of a decoder with layers that carry a state along a row.

    Each document's part of a window becomes a row, so that none reads another's state. Rows are padded behind.

    Args:
        positions: of each token in its document, of the size of ``ids``; a document begins at 0.
    """
    begins = positions == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0]
    row = begins.flatten().cumsum(0) - 1
    column = torch.arange(len(row), device=ids.device) - starts[row]
    rows = ids.new_zeros(len(starts), int(column.max()) + 1)
    rows[row, column] = ids.flatten()
    states = decoder(input_ids=rows, use_cache=False).last_hidden_state
    return states[row, column].view(*ids.shape, -1)


def head_factors(states: Tensor, head: Any, scale: float, cap: float | None) -> Readout:
    """Return the factors of the logits ``scale * (states @ weight.T + bias)``, before the cap.

    The scale goes to the states. A bias becomes one more column of the weight, which costs a copy of it.
    """
    states = states if scale == 1 else states * scale
    if getattr(head, "bias", None) is None:
        return Readout(states, head.weight, cap)
    return Readout(
        nn.functional.pad(states, (0, 1), value=scale), torch.cat([head.weight, head.bias[:, None]], dim=1), cap
    )


def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy (nats) of ``softmax(hidden @ weight.T)``, without logits of all tokens.

    Products use the tensors' dtype, or autocast's if enabled; softmax and sums use float32. The forward pass computes
    the gradients that ``hidden`` and ``weight`` require, unless gradients are disabled. The backward pass returns them
    without a copy and therefore runs only once, even with ``retain_graph``.

    Args:
        hidden: input of the head, [tokens, hidden], float32 or bfloat16.
        weight: the head, [vocabulary, hidden], of the same dtype.
        targets: int64 [tokens]; ``IGNORE_INDEX`` for no loss.
        cap: bounds logits to ``cap * tanh(logits / cap)``.
        chunk: tokens in a chunk; None to suit the device.

    Returns:
        The sum, a float32 scalar, differentiable once in ``hidden`` and ``weight``; and each token's loss, float32
        [tokens], detached, zero where ignored.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
        RuntimeError: in a second backward pass, or in one with ``create_graph``.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {[*targets.shape]} do not fit hidden {[*hidden.shape]}")
    mask = targets != IGNORE_INDEX
    safe_targets = targets.where(mask, 0)
    return chunked_sum(
        hidden, weight, mask, lambda part, logits: _cross_entropy(logits, safe_targets[part], cap), chunk=chunk
    )


#: function of a slice of the tokens and of their logits [tokens, vocabulary], which it may overwrite; returns losses
#: [tokens], and the gradient in the logits as ``gradient * scale``, [tokens, vocabulary] and [tokens, 1]
LogitGradient = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]


def chunked_sum(
    hidden: Tensor, weight: Tensor, mask: Tensor, logit_gradient: LogitGradient, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum a loss of the logits ``hidden @ weight.T`` chunk by chunk; see :func:`summed_loss`.

    Args:
        hidden: input of the head, [tokens, hidden].
        weight: the head, [vocabulary, hidden].
        mask: bool [tokens], true where a token has a loss.
        logit_gradient: computes a chunk's losses and gradient; called with autocast and gradients disabled.
        chunk: tokens in a chunk; None to suit the device.

    Raises:
        ValueError: if the shapes do not fit, or the chunk is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} do not fit")
    if chunk is None:
        chunk = _pick_chunk(len(hidden), len(weight), hidden.device.type)
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is not positive")
    # Inside an autograd function gradients are always disabled, so this must be asked here.
    needs_gradient = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _SummedLoss.apply(hidden, weight, mask, logit_gradient, chunk, needs_gradient)


def token_chunks(tokens: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Slices of the tokens whose logits are computed at once, to suit the type of device; the first is the largest."""
    return _slices(tokens, _pick_chunk(tokens, vocabulary, device))


def _pick_chunk(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens in a chunk: all chunks are equal, because a short last one costs nearly as much as a full one."""
    chunk = max(_MIN_CHUNK, _CUDA_VALUES // vocabulary) if device == "cuda" else _CPU_TOKENS
    return max(1, -(-tokens // max(1, round(tokens / chunk))))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor,
        logit_gradient: LogitGradient,
        chunk: int,
        needs_gradient: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtypes = hidden.dtype, weight.dtype
        hidden, weight = to_compute_dtype(hidden), to_compute_dtype(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            losses, *gradients = _losses(hidden, weight, mask, logit_gradient, chunk, needs_gradient)
        ctx.gradients = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would accept create_graph and silently return incomplete gradients.
        if torch.is_grad_enabled():
            raise RuntimeError("summed_loss has no second derivative: call backward without create_graph")
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of summed_loss are used up by the first backward pass: compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None  # a gradient with no other reference becomes .grad uncopied
        return (*(None if g is None else g.mul_(grad_outputs[0]) for g in gradients), None, None, None, None)


def to_compute_dtype(tensor: Tensor) -> Tensor:
    """Convert a tensor to the dtype of its matrix products: autocast's if enabled, else its own."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _losses(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    logit_gradient: LogitGradient,
    chunk: int,
    needs_gradient: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's loss, and the gradients of their sum: in ``hidden``'s dtype, and for ``weight`` in float32."""
    losses = torch.empty(mask.shape, dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if needs_gradient[0] else None
    weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient[1] else None
    space = hidden.new_empty(min(chunk, len(hidden)), len(weight))
    for part in _slices(len(hidden), chunk):
        states = hidden[part]
        logits = make_logits(states, weight, space[: len(states)])
        losses[part], gradient, scale = logit_gradient(part, logits)
        scale.masked_fill_(~mask[part, None], 0)
        if gradient is not logits:
            gradient = logits.copy_(gradient)
        if hidden_gradient is not None:
            torch.mm(gradient, weight, out=hidden_gradient[part])
            hidden_gradient[part].mul_(scale)
        if weight_gradient is not None:
            _add_product(weight_gradient, gradient, (states * scale).to(states.dtype))
    return losses.masked_fill_(~mask, 0), hidden_gradient, weight_gradient


def make_logits(states: Tensor, weight: Tensor, space: Tensor) -> Tensor:
    """``states @ weight.T`` [tokens, vocabulary], written into ``space``."""
    for rows in _tiles(weight):
        torch.mm(states, weight[rows].T, out=space[:, rows])
    return space


def _cross_entropy(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The :data:`LogitGradient` of the soft-capped cross-entropy. Float32 logits are overwritten.

    The scale, one over the sum of exponentials, stays separate: scaling a token's states is cheaper than its logits.
    """
    z, tanh = softcap(logits.float(), cap)
    losses, scale = cross_entropy_gradient(z, targets)
    return losses, softcap_backward(z, tanh), scale


def cross_entropy_gradient(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy losses [tokens] and scale [tokens, 1]; float32 ``z`` becomes the unscaled gradient."""
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
    tanh = z.div_(cap).tanh_()
    return tanh * cap, tanh


def softcap_backward(gradient: Tensor, tanh: Tensor | None) -> Tensor:
    """Turn a gradient in the capped logits into one in the logits, in place; ``tanh`` is overwritten."""
    return gradient if tanh is None else gradient.mul_(tanh.square_().neg_().add_(1))


def _add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add ``gradient.T @ states`` [vocabulary, hidden] to the float32 ``total``."""
    for rows in _tiles(total):
        if states.dtype == total.dtype:
            total[rows].addmm_(gradient[:, rows].T, states)
        else:
            total[rows].add_(gradient[:, rows].T @ states)


def _tiles(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of the head, or of its gradient."""
    return _slices(len(matrix), max(1, _TILE.get(matrix.device.type, _CPU_TILE) // matrix.shape[1]))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
