"""From a study to its cells: the product of methods, targets, budgets, objectives and seeds, less what is excluded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from secateur.errors import UserError
from secateur.methods.base import Method
from secateur.methods.registry import get_method
from secateur.model.shapes import Shape
from secateur.pruning.target import Target
from secateur.study.spec import (
    ControlKind,
    ControlSpec,
    MethodEntry,
    ObjectiveSpec,
    SettingKind,
    SettingSpec,
    StudySpec,
    spell_keys,
)

__all__ = ["TWIN_NAMES", "PlannedComparison", "Pruning", "comparisons", "prunings"]

#: What a from-scratch twin is called, by what it has in common with the pruned run.
TWIN_NAMES: dict[SettingKind, str] = {
    "equal_training_tokens": "S_R",
    "equal_total_tokens": "S_{P+R}",
    "equal_training_flops": "S_F",
    "equal_total_flops": "S_{P+F}",
}


@dataclass(frozen=True)
class Pruning:
    """One model to be made: an entry of the study at one target."""

    entry: MethodEntry
    parent: str
    name: str  #: of the target
    target: Target
    method: Method
    before: Shape
    after: Shape

    @property
    def label(self) -> str:
        """E.g. ``wanda-0.5``."""
        return f"{self.entry.label}-{self.name}".replace(":", "of")

    @property
    def granularity(self) -> str:
        """Of the method; one that learns is of depth where it cuts layers alone, of width where it cuts none."""
        if self.method.granularity != "depth+width":
            return self.method.granularity
        layers = self.after.layers != self.before.layers
        narrower = dataclasses.replace(self.after, layers=self.before.layers) != self.before
        return "depth+width" if layers and narrower else "depth" if layers else "width"


@dataclass(frozen=True)
class PlannedComparison:
    """A pruned run and what it is held against."""

    pruning: Pruning
    tokens: int  #: R
    objective: ObjectiveSpec
    seed: int | None  #: None: the recipe's own
    settings: tuple[SettingKind, ...]
    controls: tuple[ControlKind, ...]


def prunings(study: StudySpec, shapes: dict[str, Shape]) -> list[Pruning]:
    """Every model that the study prunes.

    Args:
        study: it.
        shapes: those of its parents, by name.

    Raises:
        UserError: if a parent has no shape at one of the targets.
    """
    found = []
    for number, entry in enumerate(study.methods):
        method, parent = get_method(entry.method, entry.options), study.parent_of(entry)
        for name, target in entry.targets(study.ratios).items():
            try:
                after = target.shape(shapes[parent], method, entry.method)
            except UserError as error:
                where = f"methods[{number}] ({entry.label} at {name})"
                raise UserError(f"{where}: {spell_keys(str(error))}") from None
            found.append(Pruning(entry, parent, name, target, method, shapes[parent], after))
    return found


def comparisons(study: StudySpec, pruning: Pruning) -> Iterator[PlannedComparison]:
    """What is trained of a pruned model, and what it is held against."""
    entry = pruning.entry
    settings = _or(entry.settings, study.settings)
    controls = _or(entry.controls, study.controls)
    objectives = _or(entry.objective, study.retrain.objective)
    for tokens in _or(entry.tokens, study.retrain.tokens):
        for objective in objectives:
            for seed in _or(entry.seeds, study.seeds) or (None,):
                told: dict[str, Any] = {
                    "method": entry.label,
                    "target": pruning.name,
                    "tokens": tokens,
                    "seed": study.recipe.seed if seed is None else seed,
                    "objective": objective.label,
                }
                if _excluded(study, told):
                    continue
                kinds = (
                    [s.kind for s in settings if _at(s, tokens)] if objective.settings is None else objective.settings
                )
                kept = tuple(kind for kind in kinds if not _excluded(study, {**told, "setting": kind}))
                drawn = [c.init for c in controls if _at(c, tokens) and _applies(c.init, pruning)]
                drawn = [] if objective.label else drawn  # they are of the shape and the weights, whatever is minimised
                kept_controls = tuple(kind for kind in drawn if not _excluded(study, {**told, "control": kind}))
                yield PlannedComparison(pruning, tokens, objective, seed, kept, kept_controls)


def _or(own: Any, common: Any) -> Any:
    return common if own is None else own


def _at(chosen: SettingSpec | ControlSpec, tokens: int) -> bool:
    return chosen.tokens is None or tokens in chosen.tokens


def _applies(control: ControlKind, pruning: Pruning) -> bool:
    """Whether a control is another model than the twin: those of masks need one, and a dense model is its own twin."""
    if pruning.method.granularity == "sparse":
        return control != "redrawn"
    return control == "shuffled-weights"


def _excluded(study: StudySpec, told: dict[str, Any]) -> bool:
    """Whether an exclusion covers a cell."""
    return any(exclusion.covers(told) for exclusion in study.exclude)
