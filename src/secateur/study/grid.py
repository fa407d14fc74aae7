"""The cells of a study: the product of methods, targets, budgets, objectives and seeds, minus the exclusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from secateur.config import fingerprint
from secateur.errors import UserError, spell
from secateur.methods.base import LearnedMethod, Method
from secateur.methods.registry import get_method
from secateur.model.shapes import Shape
from secateur.pruning.cost import reads_text
from secateur.pruning.goals import complete_target
from secateur.pruning.iterations import PruningStep, pruning_steps
from secateur.pruning.reconstruction import why_not_reconstructed
from secateur.pruning.target import Target
from secateur.study.sections import (
    ControlKind,
    ControlSpec,
    MethodEntry,
    ObjectiveSpec,
    SettingSpec,
    TwinInit,
)
from secateur.study.settings import SettingKind
from secateur.study.spec import StudySpec
from secateur.training.adapter import check_adapter

__all__ = ["PlannedComparison", "Pruning", "comparisons", "left_out", "prunings", "seed_shift"]


@dataclass(frozen=True)
class Pruning:
    """One pruned model: an entry of the study at one target and, where seeds vary the pruning, for one seed."""

    entry: MethodEntry
    parent: str
    name: str  #: of the target
    target: Target
    method: Method
    before: Shape
    after: Shape
    step_tokens: int  #: of a step that tunes a block
    steps: tuple[PruningStep, ...]  #: one, or as many as the entry has iterations
    seed: int | None = None  #: None: shared by all seeds

    @property
    def label(self) -> str:
        """E.g. ``wanda-0.5``."""
        return f"{self.entry.label}-{self.name}".replace(":", "of")

    def training_tokens(self, sequence: int) -> int:
        """Tokens that pruning itself trains on, with windows of ``sequence`` tokens; from-scratch twins get as many."""
        if isinstance(self.method, LearnedMethod):
            return self.method.tokens(sequence)
        return (self.entry.reconstruct or 0) * self.step_tokens

    @property
    def learns(self) -> bool:
        """Whether the method learns in training what to cut."""
        return isinstance(self.method, LearnedMethod)

    @property
    def not_reconstructed(self) -> str:
        """Why its blocks cannot be tuned; empty where they can."""
        return why_not_reconstructed(self.method.granularity, self.before.experts)

    @property
    def series(self) -> str:
        """A digest that is equal for prunings of one target that differ in their steps alone."""
        keys = ("options", "calibration", "axes", "allocation", "of", "step", "keep_pattern", "propagate")
        content = {key: getattr(self.entry, key) for key in keys}
        return fingerprint([self.parent, self.entry.method, content, self.target.as_dict()])

    @property
    def granularity(self) -> str:
        """The method's granularity; for one that may cut both layers and widths, what the target cuts."""
        if self.method.granularity != "depth+width":
            return self.method.granularity
        layers = self.after.layers != self.before.layers
        narrower = dataclasses.replace(self.after, layers=self.before.layers) != self.before
        return "depth+width" if layers and narrower else "depth" if layers else "width"


@dataclass(frozen=True)
class PlannedComparison:
    """A pruned run and the runs that it is compared with."""

    pruning: Pruning
    tokens: int  #: R
    objective: ObjectiveSpec
    seed: int | None  #: None: the recipe's own
    settings: tuple[SettingKind, ...]
    controls: tuple[ControlKind, ...]


def prunings(study: StudySpec, shapes: dict[str, Shape]) -> list[Pruning]:
    """Every entry of the study at each of its targets, not yet for a seed.

    Raises:
        UserError: if a parent has no shape at one of the targets.
    """
    models = []
    for number, entry in enumerate(study.methods):
        method, parent = get_method(entry.method, entry.options), study.parent_of(entry)
        for name, target in entry.targets(study.ratios).items():
            plan = (entry.iterations, entry.iteration_schedule)
            try:
                target = complete_target(target, shapes[parent], method, entry.method)
                steps = pruning_steps(target, method, entry.method, shapes[parent], *plan)
            except UserError as error:
                where = f"methods[{number}] ({entry.label} at {name})"
                raise UserError(f"{where}: {spell(str(error), str)}") from None
            before, step_tokens = shapes[parent], study.recipe.tokens_per_step
            model = Pruning(entry, parent, name, target, method, before, steps[-1].after, step_tokens, steps)
            if entry.reconstruct and model.not_reconstructed:
                raise UserError(f"methods[{number}].reconstruct: {entry.label}: {model.not_reconstructed}")
            models.append(model)
    return models


def comparisons(study: StudySpec, pruning: Pruning) -> Iterator[PlannedComparison]:
    """The comparisons of an entry at a target, one for each budget, objective and seed, each with its own pruning."""
    entry = pruning.entry
    settings = _default(entry.settings, study.settings)
    controls = _default(entry.controls, study.controls)
    objectives = study.retrain.objectives(entry.objective)
    for tokens in _default(entry.tokens, study.retrain.tokens):
        for objective in objectives:
            if objective.kind == "reconstruct" and pruning.not_reconstructed:
                continue
            for seed in _default(entry.seeds, study.seeds.values) or (None,):
                cell: dict[str, Any] = {
                    "method": entry.label,
                    "target": pruning.name,
                    "tokens": tokens,
                    "seed": study.recipe.seed if seed is None else seed,
                    "objective": objective.label,
                }
                if _is_excluded(study, cell):
                    continue
                _check_adapter(objective, pruning)
                kinds: Any = (
                    [s.kind for s in settings if _at(s, tokens)] if objective.settings is None else objective.settings
                )
                kinds = tuple(kind for kind in kinds if not _is_excluded(study, {**cell, "setting": kind}))
                sequence, twin = study.recipe.sequence, study.twin_init_of(entry)
                inits = [c.init for c in controls if _at(c, tokens) and _applies(c.init, pruning, sequence, twin)]
                inits = [] if objective.label else inits  # controls concern shape and weights, not the objective
                inits = tuple(init for init in inits if not _is_excluded(study, {**cell, "control": init}))
                yield PlannedComparison(_seeded(study, pruning, cell["seed"]), tokens, objective, seed, kinds, inits)


def left_out(study: StudySpec, shapes: dict[str, Shape]) -> list[str]:
    """Say which cells are left out because their blocks cannot be reconstructed, one sentence for each entry."""
    reasons: dict[str, str] = {}
    for pruning in prunings(study, shapes):
        objectives = study.retrain.objectives(pruning.entry.objective)
        if pruning.not_reconstructed and any(objective.kind == "reconstruct" for objective in objectives):
            reasons[pruning.entry.label] = pruning.not_reconstructed
    return [f"{label}: no run with objective reconstruct; {reason}." for label, reason in reasons.items()]


def _check_adapter(objective: ObjectiveSpec, pruning: Pruning) -> None:
    """Check that an objective's adapter, if it has one, fits the pruned model.

    Raises:
        UserError: naming the model, and the target or the linear at fault.
    """
    if objective.adapter is None:
        return
    try:
        check_adapter(objective.adapter, pruning.after)
    except UserError as error:
        raise UserError(f"retrain.objective ({objective.label} of {pruning.label}): {spell(str(error), str)}") from None


def seed_shift(study: StudySpec, seed: int | None) -> int:
    """What a seed adds to the seeds of pruning: nothing for the recipe's own, and no number twice."""
    return 0 if seed in (None, study.recipe.seed) else seed + 1


def _seeded(study: StudySpec, pruning: Pruning, seed: int) -> Pruning:
    """The pruning of one seed; the shared one where seeds vary neither the parent nor what a method goes by."""
    stochastic = hasattr(pruning.method, "seed")
    pretrained = study.all_parents[pruning.parent].checkpoint is None
    if not study.parents_vary or not (pretrained or stochastic or reads_text(pruning.method)):
        return pruning
    method: Any = pruning.method
    if stochastic:
        method = dataclasses.replace(method, seed=method.seed + seed_shift(study, seed))
    return dataclasses.replace(pruning, method=method, seed=seed)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _at(twin: SettingSpec | ControlSpec, tokens: int) -> bool:
    """Whether a twin applies to the budget ``tokens``."""
    return twin.tokens is None or tokens in twin.tokens


def _applies(control: ControlKind, pruning: Pruning, sequence: int, twin: TwinInit) -> bool:
    """Whether a control differs from the twin: controls of the mask need one, and a dense model has none."""
    if control == "parent-continued":
        return True
    if control == "without-pruning-tokens":
        return pruning.training_tokens(sequence) > 0
    if control in ("dense-active", "dense-total"):
        return pruning.method.granularity == "experts"
    if pruning.method.granularity == "sparse":
        return control != twin
    return control == "shuffled-weights"


def _is_excluded(study: StudySpec, cell: dict[str, Any]) -> bool:
    """Whether an exclusion covers a cell."""
    return any(exclusion.covers(cell) for exclusion in study.exclude)
