"""score -> select -> plan: one function for every method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.engine import BlockWalk, removal_losses
from secateur.checkpoint import Checkpoint, model_card, write_checkpoint
from secateur.data.tokenizer import token_hash
from secateur.methods import DepthMethod, Granularity, WeightMethod, WidthMethod, get_method
from secateur.plan import Plan
from secateur.select import keep_channels, keep_weights, lowest
from secateur.shapes import Shape, solve_depth, solve_width
from secateur.surgery import cut_config, cut_tensors

__all__ = ["Calibration", "make_plan", "scoring_flops", "target_shape", "write_pruned"]


@dataclass(frozen=True)
class Calibration:
    """The token ids that scores are computed on."""

    windows: Tensor  #: int64 [windows, positions]
    source: str  #: where they are from

    def record(self) -> dict[str, Any]:
        """What identifies them."""
        count, length = self.windows.shape
        return {
            "source": self.source,
            "windows": count,
            "seqlen": length,
            "tokens": count * length,
            "hash": token_hash(self.windows.numpy()),
        }


def target_shape(shape: Shape, granularity: Granularity, ratio: float) -> Shape:
    """The shape that pruning at ``ratio`` gives, known before anything is scored.

    Raises:
        UserError: if the model has no such shape.
    """
    if granularity == "depth":
        return solve_depth(shape, ratio)
    return solve_width(shape, ratio) if granularity == "width" else shape


def scoring_flops(shape: Shape, after: Shape, granularity: Granularity, tokens: int, context: int) -> float:
    """FLOPs of scoring: forward passes over the calibration tokens, in whole models' worth.

    Width takes one pass. Sparse takes two, as each block runs before and after its own pruning. Depth takes one pass
    and, for each candidate run, the blocks behind it.
    """
    passes = {"width": 1.0, "sparse": 2.0}
    if granularity == "depth":
        suffix = sum(range(after.layers + 1))  # blocks behind the run, over all candidates
        passes["depth"] = 1 + suffix / shape.layers
    return passes[granularity] * tokens * shape.forward_flops(context)


def make_plan(
    checkpoint: Checkpoint, method: str, ratio: float, calibration: Calibration, *, batch: int = 8, device: str = "cpu"
) -> Plan:
    """Score a checkpoint with a method and select what to keep.

    Args:
        checkpoint: the model; it is read block by block.
        method: a name from the registry.
        ratio: the share to remove: of the non-embedding parameters for depth and width, of the block linears' weights
            for sparse methods.
        calibration: what to score on.
        batch: windows at once.
        device: where to compute.

    Raises:
        UserError: on an unknown method, a ratio that this model has no shape for, or values that are not finite.
    """
    found = get_method(method)
    after = target_shape(checkpoint.shape, found.granularity, ratio)
    walk = BlockWalk(checkpoint, calibration.windows, batch=batch, device=device, label=f"score {method}")
    if isinstance(found, DepthMethod):
        decided = _decide_depth(found, walk, after)
    elif isinstance(found, WidthMethod):
        decided = _decide_width(found, walk, after)
    else:
        assert isinstance(found, WeightMethod)
        decided = _decide_weights(found, walk, ratio)
    fields = {"after": after, **decided}
    record = {**calibration.record(), "method_source": found.source}
    return Plan.keeping_all(
        method,
        found.granularity,
        ratio,
        checkpoint.shape,
        calibration=record,
        source=checkpoint.digest,
        **fields,
    )


def _decide_depth(method: DepthMethod, walk: BlockWalk, after: Shape) -> dict[str, Any]:
    layers = walk.checkpoint.shape.layers
    length = layers - after.layers
    loss_full, losses = removal_losses(walk, length)
    scores = method.score(loss_full, torch.tensor(losses))
    first = lowest(scores)
    gone = range(first, first + length)
    return {
        "keep_layers": torch.tensor([layer for layer in range(layers) if layer not in gone]),
        "scores": {"layers": scores},
        "summary": {
            "detail": f"layers {first}-{first + length - 1} of 0-{layers - 1} removed"
            if length > 1
            else f"layer {first} of 0-{layers - 1} removed",
            "loss_full": loss_full,
            "candidates": [{"first": i, "last": i + length - 1, "loss": loss} for i, loss in enumerate(losses)],
        },
    }


def _decide_width(method: WidthMethod, walk: BlockWalk, after: Shape) -> dict[str, Any]:
    family = walk.family
    wanted = dict.fromkeys(family.hidden_sites, method.needs["hidden"]) | {family.ffn_site: method.needs["ffn"]}
    hidden_sites, scores, keep_ffn = [], {}, {}
    states = walk.start()
    for block in walk.blocks():
        stats, states = block.observe(states, wanted)
        hidden_sites += [stats[site] for site in family.hidden_sites]
        ffn = method.score("ffn", [stats[family.ffn_site]])
        scores[f"ffn.{block.index}"] = ffn
        keep_ffn[block.index] = keep_channels(ffn, after.ffn).cpu()
    scores["hidden"] = method.score("hidden", hidden_sites)
    before = walk.checkpoint.shape
    return {
        "keep_hidden": keep_channels(scores["hidden"], after.hidden).cpu(),
        "keep_ffn": keep_ffn,
        "scores": scores,
        "summary": {
            "detail": f"hidden {before.hidden} to {after.hidden}, FFN {before.ffn} to {after.ffn} channels",
            "importance_kept": {
                name: float(score.topk(after.hidden if name == "hidden" else after.ffn).values.sum() / score.sum())
                for name, score in scores.items()
            },
        },
    }


def _decide_weights(method: WeightMethod, walk: BlockWalk, ratio: float) -> dict[str, Any]:
    family = walk.family
    masks: dict[str, Tensor] = {}
    states = walk.start()
    for block in walk.blocks():
        stats, _ = block.observe(states, dict.fromkeys(family.sites, method.needs))
        for linear in family.linears:
            weight = block.weight(linear)
            scores = method.score(weight, stats[family.site_of(linear)])
            keep = keep_weights(scores, ratio, within=method.compare)
            block.set_weight(linear, weight * keep)
            masks[family.block_tensor(block.index, linear)] = keep.cpu()
        states = block.run(states)
    zeros = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    weights = sum(mask.numel() for mask in masks.values())
    return {
        "masks": masks,
        "summary": {
            "detail": f"{pruned:,} of {weights:,} block weights zeroed ({100 * pruned / weights:.1f}%)",
            "sparsity": zeros,
        },
    }


def write_pruned(checkpoint: Checkpoint, plan: Plan, out: Path, *, base: str | None = None) -> dict[str, Any]:
    """Cut the checkpoint to the plan and write it, the plan, the tokenizer and a card into the existing ``out``.

    Returns:
        The content of ``plan.json``.
    """
    content = plan.save(out)
    share = plan.removed()
    lines = [
        f"Pruned with **{plan.method}** ({plan.granularity}) at ratio {plan.ratio:g} by secateur: "
        f"{plan.summary['detail']}.",
        "",
        f"- removed: {100 * share['total']:.1f}% of all parameters, "
        f"{100 * share['non_embedding']:.1f}% of those outside the embeddings",
        f"- shape: {plan.after}",
        f"- calibration: {plan.calibration['tokens']:,} tokens of {plan.calibration['source']}",
        "- not retrained; `plan.json` and `plan.safetensors` hold the scores and the selection",
    ]
    write_checkpoint(
        out,
        cut_config(checkpoint, plan),
        cut_tensors(checkpoint, plan),
        provenance={
            "kind": "pruned",
            "method": plan.method,
            "ratio": content["ratio"],
            "plan": content["fingerprint"],
            "source": plan.source,
            "calibration": plan.calibration,
        },
        card=model_card(f"Pruned with {plan.method}", base, lines),
    )
    checkpoint.copy_tokenizer(out)
    return content
