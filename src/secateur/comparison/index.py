"""Comparisons by name: which cells, pruned models and parents belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.comparison.records import Cell, Cost, Parent, PrunedModel, StudyResults
from secateur.model.families import Granularity

__all__ = ["PRUNED", "Group", "Index", "Model", "group_of", "mean_loss"]

PRUNED = "P-R"


@dataclass(frozen=True)
class Model:
    """One pruned model: what was made of which parent by which method."""

    parent: str
    method: str
    target: str


@dataclass(frozen=True)
class Group:
    """One comparison: a pruned and retrained model with the runs that it is compared with."""

    parent: str
    method: str
    target: str
    retrain_tokens: int
    objective: str
    seed: int | None  #: None: all seeds of the comparison together

    @property
    def pooled(self) -> Group:
        """The comparison without its seed."""
        return dataclasses.replace(self, seed=None)

    @property
    def model(self) -> Model:
        """The pruned model that it is about."""
        return Model(self.parent, self.method, self.target)


class Index:
    """The records of a study, found by what they are of.

    Attributes:
        parents: name -> the parent's first record. Where each seed has its own parent, names, shapes, tokens and FLOPs
            are equal for all seeds; :meth:`parent` gives the record of one seed.
        pruned: the same for pruned models; :meth:`pruned_model` gives the record of one seed.
    """

    def __init__(self, results: StudyResults):
        self.results = results
        self._parents = {(parent.name, parent.seed): parent for parent in results.parents}
        self._pruned = {(_model_of(pruned), pruned.seed): pruned for pruned in results.pruned}
        self.parents: dict[str, Parent] = {}
        self.pruned: dict[Model, PrunedModel] = {}
        for parent in results.parents:
            self.parents.setdefault(parent.name, parent)
        for pruned in results.pruned:
            self.pruned.setdefault(_model_of(pruned), pruned)
        self.cells: dict[tuple[Group, str], Cell] = {(group_of(cell), cell.name): cell for cell in results.cells}
        self.groups = self._groups()
        self.pools: dict[Group, tuple[Group, ...]] = {}  #: a comparison without its seed -> itself with each seed
        for group in self.groups:
            self.pools[group.pooled] = (*self.pools.get(group.pooled, ()), group)
        self.comparisons = tuple(self._without_seed(pool, seeds) for pool, seeds in self.pools.items())

    def _groups(self) -> tuple[Group, ...]:
        """Every comparison in the study's order; a pruned model without a run yet is among them."""
        groups = dict.fromkeys(group_of(cell) for cell in self.results.cells)
        trained = {group.model for group in groups}
        like = next(iter(groups), Group("", "", "", 0, "", 0))
        for model in self.pruned:
            if model not in trained:
                groups[dataclasses.replace(like, **dataclasses.asdict(model))] = None
        return tuple(groups)

    def _without_seed(self, pool: Group, seeds: Sequence[Group]) -> Group:
        """The comparison as reports print it: without its seed where the study has several."""
        return pool if self.several_seeds else seeds[0]

    @property
    def several_seeds(self) -> bool:
        """Whether any two comparisons differ in their seed."""
        return len({group.seed for group in self.groups}) > 1

    @property
    def models(self) -> tuple[Model, ...]:
        """The pruned models that are compared, in the study's order."""
        return tuple(dict.fromkeys(group.model for group in self.groups))

    def cell(self, group: Group, name: str) -> Cell | None:
        """The run called ``name`` in a comparison with a seed."""
        return self.cells.get((group, name))

    def over_seeds(self, group: Group, name: str) -> list[Cell | None]:
        """The runs called ``name``, one for each seed of the comparison, in the order of ``pools``."""
        return [self.cell(seeded, name) for seeded in self.pools[group.pooled]]

    def of(self, group: Group) -> list[Cell]:
        """Every run of a comparison, all its seeds."""
        return [cell for cell in self.results.cells if group_of(cell).pooled == group.pooled]

    def parent(self, name: str, seed: int | None) -> Parent | None:
        """The parent of a comparison with ``seed``: that seed's own, or the one that all seeds share."""
        return self._parents.get((name, seed)) or self._parents.get((name, None))

    def pruned_model(self, model: Model, seed: int | None) -> PrunedModel | None:
        """The pruned model of a comparison with ``seed``: that seed's own, or the one that all seeds share."""
        return self._pruned.get((model, seed)) or self._pruned.get((model, None))

    def parents_over_seeds(self, group: Group) -> list[Parent]:
        """The parents of a comparison: one for each of its seeds, or the one that they share."""
        records = (self.parent(group.parent, seeded.seed) for seeded in self.pools[group.pooled])
        return list({parent.seed: parent for parent in records if parent}.values())

    def pruned_over_seeds(self, group: Group) -> list[PrunedModel]:
        """The pruned models of a comparison: one for each of its seeds, or the one that they share."""
        records = (self.pruned_model(group.model, seeded.seed) for seeded in self.pools[group.pooled])
        return list({pruned.seed: pruned for pruned in records if pruned}.values())

    def parent_cost(self, name: str) -> Cost | None:
        """Of one pretraining; None where nobody knows it."""
        parent = self.parents.get(name)
        return parent.cost if parent else None

    def ratio(self, model: Model) -> float | None:
        """The requested or achieved ratio."""
        record = self.pruned.get(model) or self._any_cell(model)
        return record.ratio if record else None

    def granularity(self, model: Model) -> Granularity | None:
        """What was removed: layers, channels or weights."""
        record = self.pruned.get(model) or self._any_cell(model)
        return record.granularity if record else None

    def _any_cell(self, model: Model) -> Cell | None:
        return next((cell for cell in self.results.cells if group_of(cell).model == model), None)


def mean_loss(records: Iterable[Cell | Parent | PrunedModel]) -> float | None:
    """The mean held-out loss of the records that were measured; None if there are none."""
    losses = [record.evaluation.loss for record in records if record.evaluation]
    return sum(losses) / len(losses) if losses else None


def _model_of(pruned: PrunedModel) -> Model:
    return Model(pruned.parent, pruned.method, pruned.target)


def group_of(cell: Cell) -> Group:
    """The comparison, with its seed, that a cell belongs to."""
    return Group(cell.parent, cell.method, cell.target, cell.retrain_tokens, cell.objective, cell.seed)
