"""Whether a study is in the regime of its question: a well-trained parent, and retraining that repays its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.comparison.ablation import CONTINUED
from secateur.comparison.decision import Decision
from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.records import Cell, Evaluation, Parent, PrunedModel
from secateur.comparison.twins import SCRATCH, Paired, mean_difference, pair_evaluations

__all__ = ["PUBLISHED", "RateSweeps", "Regime", "RegimeCheck", "TokenShare", "regimes"]

Pair = tuple[Evaluation | None, Evaluation | None]


@dataclass(frozen=True)
class TokenShare:
    """The tokens that a model was trained on, beside its parameters."""

    tokens: int | None  #: None: unknown
    parameters: int
    non_embedding: int

    @property
    def per_parameter(self) -> float | None:
        """Tokens for each parameter."""
        return None if self.tokens is None else self.tokens / self.parameters

    @property
    def per_non_embedding(self) -> float | None:
        """Tokens for each parameter outside the embeddings."""
        return None if self.tokens is None else self.tokens / self.non_embedding


#: The parent of arXiv:2606.14150: 50,000 steps of 512 x 8,192 tokens, in the shape of Llama-3.1-8B.
PUBLISHED = TokenShare(209_715_200_000, 8_030_261_248, 6_979_588_096)


@dataclass(frozen=True)
class RateSweeps:
    """Whether learning rates were chosen by a sweep; None where the study trains no such model."""

    parent: bool | None
    scratch: bool | None
    retraining: bool | None


@dataclass(frozen=True)
class RegimeCheck:
    """Two losses that the regime depends on; the decision is ``first`` where they are as the question assumes."""

    group: Group
    decision: Decision
    sparse: bool  #: the pruned model and its twin have the parent's shape, with zeros


@dataclass(frozen=True)
class Regime:
    """The regime of one parent."""

    parent: str
    share: TokenShare
    sweeps: RateSweeps
    twins: tuple[RegimeCheck, ...]  #: the parent (first) against each of its twins S_{P+R}
    retraining: tuple[RegimeCheck, ...]  #: each P-R (first) against its pruned model before retraining
    continued: tuple[RegimeCheck, ...] = ()  #: the parent trained on the same tokens (first) against each P-R
    unmatched: tuple[RegimeCheck, ...] = ()  #: a checkpoint (first) against each P-R that has no such control

    @property
    def better_twins(self) -> tuple[RegimeCheck, ...]:
        """The twins whose loss is lower than the parent's."""
        return tuple(check for check in self.twins if check.decision.verdict == "second")

    @property
    def unmatched_gains(self) -> tuple[RegimeCheck, ...]:
        """The pruned models whose loss is below that of a checkpoint which the study did not train on its corpus."""
        return tuple(check for check in self.unmatched if check.decision.verdict == "second")

    @property
    def harmful_retraining(self) -> tuple[RegimeCheck, ...]:
        """The comparisons in which retraining raised the loss."""
        return tuple(check for check in self.retraining if check.decision.verdict == "second")


def regimes(index: Index) -> tuple[Regime, ...]:
    """The regime of each parent of a study, in its order."""
    return tuple(_regime(index, parent) for parent in index.parents.values())


def _regime(index: Index, parent: Parent) -> Regime:
    """The regime of a parent; of several seeds, ``parent`` is the first, with the tokens and parameters of all."""
    twins: dict[Group, list[Pair]] = {}
    retraining: dict[Group, list[Pair]] = {}
    continued: dict[Group, list[Pair]] = {}
    unmatched: dict[Group, list[Pair]] = {}
    for group in (group for group in index.comparisons if group.parent == parent.name):
        for seeded in index.pools[group.pooled]:
            scratch, retrained = index.cell(seeded, SCRATCH["total"]), index.cell(seeded, PRUNED)
            if scratch:
                twins.setdefault(group, []).append(_pair(index.parent(parent.name, seeded.seed), scratch))
            if retrained:
                pruned = index.pruned_model(group.model, seeded.seed)
                retraining.setdefault(group, []).append(_pair(retrained, pruned))
                control = index.cell(replace(seeded, objective=""), CONTINUED)  # no other objective has one
                if control:
                    continued.setdefault(group, []).append(_pair(control, retrained))
                elif not parent.curve:  # a checkpoint
                    unmatched.setdefault(group, []).append(_pair(parent, retrained))
    cells = [cell for cell in index.results.cells if cell.parent == parent.name]
    return Regime(
        parent=parent.name,
        share=TokenShare(parent.cost.tokens if parent.cost else None, parent.parameters, parent.non_embedding),
        sweeps=RateSweeps(
            parent=parent.sweep is not None if parent.curve else None,  # a checkpoint has no curve
            scratch=_swept(cell for cell in cells if cell.path == "scratch"),
            retraining=_swept(cell for cell in cells if cell.path == "pruned"),
        ),
        twins=_checks(index, twins),
        retraining=_checks(index, retraining),
        continued=_checks(index, continued),
        unmatched=_checks(index, unmatched),
    )


def _pair(first: Cell | Parent | PrunedModel | None, second: Cell | Parent | PrunedModel | None) -> Pair:
    return first.evaluation if first else None, second.evaluation if second else None


def _swept(cells: Iterable[Cell]) -> bool | None:
    sweeps = [cell.sweep is not None for cell in cells]
    return all(sweeps) if sweeps else None


def _checks(index: Index, pairs: Mapping[Group, Sequence[Pair]]) -> tuple[RegimeCheck, ...]:
    """Decide each comparison over its seeds, by itself; models that several share count once.

    The decisions are not corrected for their number: the regime warns, and a correction would hide what shows.
    """
    distinct: dict[tuple[object, ...], Group] = {}
    for group, seeds in pairs.items():
        windows = (evaluation and (evaluation.loss, evaluation.windows) for pair in seeds for evaluation in pair)
        key = tuple(windows)
        distinct.setdefault(key if all(key) else (group,), group)
    return tuple(
        RegimeCheck(group, _decide(pairs[group]), sparse=index.granularity(group.model) == "sparse")
        for group in distinct.values()
    )


def _decide(pairs: Sequence[Pair]) -> Decision:
    """Decide whether the first of each pair has the lower loss; pairs without both losses are left out."""
    differences = [pair_evaluations(first, second) for first, second in pairs if first and second]
    measured = [difference for difference in differences if isinstance(difference, Paired)]
    reason = next((f"the two {text}" for text in differences if isinstance(text, str)), "a held-out loss is missing")
    return mean_difference(measured) or Decision("not measured", reason=reason)
