"""What block reconstruction is asked for, what it goes with, and the sizes of its steps: known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from secateur.config import Positive, spec
from secateur.formatting import percent, plural

__all__ = ["RATE", "Reconstruction", "default_step_windows", "describe_reconstruction", "why_not_reconstructed"]

RATE = 0.02  #: default, by measurement (docs/methods.md)
_TOKENS_PER_STEP = 4096


@spec
class Reconstruction:
    """How blocks are tuned."""

    steps: Positive  #: of AdamW, for each part of a block
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = RATE  #: peak learning rate over a tensor's RMS


def describe_reconstruction(record: Mapping[str, Any]) -> str:
    """Describe a reconstruction in a line: its steps and tokens, and the mean error of the blocks' outputs.

    The error is that on held-out windows where there are any.
    """
    blocks = record["blocks"]
    side = "held_out_" if record["held_out_windows"] else ""
    before, after = (sum(block[f"{side}{when}"] for block in blocks) / len(blocks) for when in ("before", "after"))
    unchanged = sum(not block["tuned"] for block in blocks)
    read = f"{plural(record['steps'], 'step')} of attention and of FFN on {plural(record['tokens'], 'token')}"
    return (
        f"{read}, block by block; the error of the blocks' outputs fell from {percent(before)} to {percent(after)} "
        f"(mean{', held-out windows' if side else ''})"
        + (f"; {plural(unchanged, 'block')} without tuned weights, since the error grew" if unchanged else "")
    )


def default_step_windows(seqlen: int) -> int:
    """Windows of ``seqlen`` tokens in a step of AdamW: 4,096 tokens, or one window if that is longer."""
    return max(1, _TOKENS_PER_STEP // seqlen)


def why_not_reconstructed(granularity: str, experts: int) -> str:
    """Why a pruned model cannot be reconstructed; empty where it can.

    Args:
        granularity: what its method removes.
        experts: routed experts in each of its layers.
    """
    if granularity not in ("sparse", "width"):
        return f"it tunes what methods for weights or widths leave of a block, and this one goes by {granularity}"
    if experts:
        return "it needs whole blocks in memory, and those of a mixture are read expert by expert"
    return ""
