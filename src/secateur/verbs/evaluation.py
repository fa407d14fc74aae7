"""eval: the loss and perplexity of a checkpoint on held-out text."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.data.token_files import is_token_file
from secateur.evaluate.loss import Protocol
from secateur.evaluate.loss import evaluate as measure
from secateur.progress import task
from secateur.runtime import pick_device
from secateur.verbs.answer import Answer
from secateur.verbs.ids import protocol_of, window_length

__all__ = ["evaluate"]

FEW = 1000  #: predicted tokens below which a loss says little


def evaluate(arguments: Namespace) -> Answer:
    """``secateur eval MODEL``."""
    device = pick_device(arguments.device)
    checkpoint = Checkpoint(arguments.model)
    protocol = protocol_of(
        checkpoint, arguments.data, field=arguments.field, windows=arguments.windows, seqlen=arguments.seqlen
    )
    model: Any = checkpoint.load()
    model.to(device)
    with task("evaluate", protocol.tokens) as progress:
        result = measure(model, protocol, batch=arguments.batch, advance=progress.advance)
    answer = {"model": str(arguments.model), **{k: result[k] for k in ("loss", "perplexity", "tokens")}}
    used = answer["protocol"] = protocol.record()
    answer["note"] = _note(protocol, checkpoint, arguments.seqlen)
    lines = [
        f"{arguments.model} on {arguments.data}",
        f"loss         {result['loss']:.4f} nats a token",
        f"perplexity   {result['perplexity']:.4f}",
        f"tokens       {result['tokens']:,} predicted, in {used['windows']} windows of {used['seqlen']}, "
        f"hash {used['hash'][:16]}",
        f"protocol     {used['fingerprint'][:16]}",
    ]
    lines += [f"note         {answer['note']}"] if answer["note"] else []
    return answer, "\n".join(lines), 0


def _note(protocol: Protocol, checkpoint: Checkpoint, seqlen: int | None) -> str | None:
    """A word of caution where a loss is that of little text."""
    if protocol.tokens < FEW:
        return f"{protocol.tokens:,} predicted tokens are few: the figure may be far off; measure on more text"
    length = window_length(checkpoint, seqlen)
    if not is_token_file(protocol.source) and protocol.windows[0].shape[1] < length:
        return f"the text is shorter than one window of {length:,} tokens; measure on more text"
    return None
