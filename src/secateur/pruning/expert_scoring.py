"""Score the routed experts of a mixture and select those to keep, as many in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.routed import ExpertOutputs
from secateur.errors import UserError
from secateur.formatting import plural
from secateur.methods.base import ExpertMethod, RoutedTokens
from secateur.methods.selection import keep_experts
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.pruning.target import Propagate

__all__ = ["FEW_TOKENS", "decide_experts", "describe_routing", "report_few_tokens"]

FEW_TOKENS = 100  #: fewer tokens are too few for the score of an expert


def decide_experts(
    method: ExpertMethod, walk: BlockWalk, after: Shape, *, propagate: Propagate = "unpruned"
) -> dict[str, Any]:
    """Score each layer's experts and keep the highest: fields of a plan.

    Args:
        propagate: ``pruned``: each block runs again with its kept experts alone before the next is scored.
    """
    shape = walk.checkpoint.shape
    routed = shape.layers_with("experts")
    nothing = torch.zeros(3, 2, shape.experts, dtype=torch.float64)

    def select(layer: int) -> Tensor:
        return keep_experts(walk.journal[f"score.{layer}"], after.experts, shape.groups[0])

    def cut(block: Block) -> None:
        if block.index in routed:
            block.keep_experts(select(block.index))

    for block, stats in walk.observe({}, experts=True, replay=cut if propagate == "pruned" else None):
        entries: dict[str, Tensor] = {}  # a dense block has none, and is a finished step of the journal all the same
        if block.index in routed:
            sums = stats["experts"][ExpertOutputs].cpu() if method.calibrated else nothing
            entries = {f"routed.{block.index}": sums, f"score.{block.index}": method.score(_tokens(sums.sum(dim=1)))}
        walk.journal.put(block.index, entries)
        if propagate == "pruned":
            cut(block)
    scores = {layer: walk.journal[f"score.{layer}"] for layer in routed}
    for layer, score in scores.items():
        if not torch.isfinite(score).all():
            raise UserError(f"{walk.checkpoint.directory}: the scores of the experts of layer {layer} are not finite")
    keep = {layer: select(layer) for layer in routed}
    kind = "in every layer" if len(routed) == shape.layers else f"in {plural(len(routed), 'layer')} of {shape.layers}"
    summary: dict[str, Any] = {"detail": f"routed experts {shape.experts} to {after.experts} {kind}"}
    if method.calibrated:
        summary["routing"] = _routing(method, {layer: walk.journal[f"routed.{layer}"] for layer in routed})
        _report(summary["routing"])
    evidence = {f"experts.{layer}": score for layer, score in scores.items()}
    return {"keep_experts": keep, "scores": evidence, "summary": summary}


def _tokens(sums: Tensor) -> RoutedTokens:
    """Name the rows of sums [3, experts] (:class:`ExpertOutputs`)."""
    return RoutedTokens(*sums)


def _routing(method: ExpertMethod, sums: Mapping[int, Tensor]) -> dict[str, Any]:
    """Describe the evidence: tokens of each expert, experts with few, and the agreement of two halves of the text.

    Args:
        sums: layer -> sums over the tokens of each half [3, 2, experts].
    """
    tokens = {layer: s[0].sum(dim=0) for layer, s in sums.items()}
    ranks = [_rank_agreement(*(method.score(_tokens(s[:, half])) for half in (0, 1))) for s in sums.values()]
    return {
        **_few_tokens({str(layer): t for layer, t in tokens.items()}, FEW_TOKENS),
        "rank_agreement": dict(zip(map(str, sums), ranks, strict=True)),
    }


def _few_tokens(tokens: Mapping[str, Tensor], least: int) -> dict[str, Any]:
    """Describe how many tokens are routed to each expert, and list those with fewer than ``least``.

    Args:
        tokens: layer -> tokens of each expert.
    """
    few = {layer: (t < least).nonzero()[:, 0].tolist() for layer, t in tokens.items()}
    return {
        "tokens": {layer: t.long().tolist() for layer, t in tokens.items()},
        "few_tokens": least,
        "few": {layer: experts for layer, experts in few.items() if experts},
    }


def report_few_tokens(walk: BlockWalk, least: int, consequence: str) -> dict[str, Any]:
    """Describe the tokens of each expert in a walk's journal, and list in a line the experts that few tokens reach.

    Args:
        least: fewer tokens are few.
        consequence: what becomes of experts with few, as the end of "100 tokens and ...".
    """
    tokens = walk.journal.with_prefix("routed.")
    routing = _few_tokens({layer: tokens[layer] for layer in sorted(tokens, key=int)}, least)
    places = [f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in routing["few"].items()]
    if places:
        few, total = sum(map(len, routing["few"].values())), sum(map(len, routing["tokens"].values()))
        more = f"; and {plural(len(places) - 8, 'more layer')}" if len(places) > 8 else ""
        notify(
            f"experts: {few} of {total} saw fewer than {routing['few_tokens']} tokens and {consequence} "
            f"({'; '.join(places[:8])}{more}); calibrate on more text"
        )
    return routing


def _rank_agreement(first: Tensor, second: Tensor) -> float | None:
    """Spearman's correlation of two rankings; None where one half ranks nothing."""
    ranks = torch.stack([score.argsort(stable=True).argsort(stable=True).double() for score in (first, second)])
    constant = len(first) < 2 or first.unique().numel() < 2 or second.unique().numel() < 2
    return None if constant else float(torch.corrcoef(ranks)[0, 1])


def _report(routing: Mapping[str, Any]) -> None:
    """Say in a line or two how far the calibration text supports the choice."""
    ranks = _ranks(routing)
    advice = "; calibrate on more text if that is low" if ranks and min(ranks) < _LOW_AGREEMENT else ""
    notify(f"experts: {describe_routing(routing)}{advice}")


def describe_routing(routing: Mapping[str, Any]) -> str:
    """Describe in words how the calibration text was routed.

    Args:
        routing: ``summary.routing`` of a plan.
    """
    counts = [count for layer in routing["tokens"].values() for count in layer]
    few = sum(map(len, routing["few"].values()))
    text = (
        f"{min(counts):,} to {max(counts):,} tokens routed to each; "
        f"{few} of {plural(len(counts), 'expert')} saw fewer than {routing['few_tokens']}"
    )
    if "rank_agreement" not in routing:  # methods that prune inside experts rank none
        return text
    ranks = _ranks(routing)
    agreement = f"{min(ranks):.2f} to {max(ranks):.2f}" if ranks else "not measured"
    return f"{text}; rank agreement of scores from two halves of the text: {agreement}"


def _ranks(routing: Mapping[str, Any]) -> list[float]:
    """The rank agreements that were measured, layer by layer."""
    return [rank for rank in routing.get("rank_agreement", {}).values() if rank is not None]


_LOW_AGREEMENT = 0.8  #: Spearman's correlation below which more text is advised
