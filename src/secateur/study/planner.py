"""The stages of a study, as a pure function: nothing is read, run or written.

The training split is cut by token index. A parent trains on the P tokens before ``start``; pruning scores use some of
them. Retraining begins at ``start``. A twin at equal total tokens trains on both parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from secateur.config import identity
from secateur.errors import UserError
from secateur.methods.base import LearnedMethod
from secateur.model.shapes import solve_width
from secateur.pruning.cost import scoring_flops
from secateur.study.grid import PlannedComparison, Pruning, comparisons, prunings
from secateur.study.resolve import ResolvedStudy, split_paths
from secateur.study.settings import TWIN_NAMES, SettingKind
from secateur.study.spec import ControlKind, StudySpec
from secateur.study.stage import Stage, unique
from secateur.study.training_runs import Inputs, TrainingRuns, sizes_of

__all__ = ["stages_of", "tokens_needed", "trunk_savings"]

_EQUAL_TOTAL = ("equal_total_tokens", "equal_total_flops")


def stages_of(study: StudySpec, resolved: ResolvedStudy) -> list[Stage]:
    """All stages of a study, each after its inputs.

    Several cells may share a stage, e.g. if two ratios lead to the same shape. The stage then appears once for each
    cell, always with the same fingerprint.

    Raises:
        UserError: if a parent has no shape at one of the targets, or a setting is impossible for a parent.
    """
    return _Builder(study, resolved).build()


def tokens_needed(stages: Sequence[Stage]) -> int:
    """Tokens that the training split must have."""
    return max((stage.identity["slice"][1] for stage in stages if "slice" in stage.identity), default=0)


class _Builder(TrainingRuns):
    def __init__(self, study: StudySpec, resolved: ResolvedStudy) -> None:
        corpus_identity, paths = split_paths(identity(study.text))
        corpus = Stage("corpus", "corpus", {**corpus_identity, "digest": resolved.corpus}, runtime=paths)
        super().__init__(study, corpus, resolved.suite)
        self.resolved = resolved
        self.prunings = prunings(study, {name: parent.shape for name, parent in resolved.parents.items()})
        self.start = self._start()
        self.parents = {name: self._parent(name) for name in study.all_parents}

    def build(self) -> list[Stage]:
        for pruning in self.prunings:
            pruned = self._pruned(pruning)
            for comparison in comparisons(self.study, pruning):
                run = self._pruned_run(comparison, pruned)
                for setting in comparison.settings:
                    self._twin(comparison, setting, pruned, run)
                for control in comparison.controls:
                    self._control(comparison, control, pruned)
        return self.stages

    # --- slices of the training split --------------------------------------------------------------------------------

    def _start(self) -> int:
        """The first token of all retraining: after the tokens of pretraining or, for checkpoints, of scoring."""
        pretraining = [parent.tokens or 0 for parent in self.study.all_parents.values() if parent.checkpoint is None]
        if pretraining:
            return max(pretraining)
        return max(self._scored(pruning) for pruning in self.prunings)

    def _scored(self, pruning: Pruning) -> int:
        """Tokens that a method scores or trains on."""
        if isinstance(pruning.method, LearnedMethod):
            return pruning.method.tokens(self.sequence)
        return self.study.calibration.windows * self.sequence if pruning.method.calibrated else 0

    def _before(self, parent: str) -> int:
        """The first token of a parent's pretraining."""
        spec = self.study.all_parents[parent]
        return self.start - (spec.tokens or 0) if spec.checkpoint is None else 0

    # --- parents and pruned models ----------------------------------------------------------------------------------

    def _parent(self, name: str) -> Stage:
        spec, parent = self.study.all_parents[name], self.resolved.parents[name]
        facts = {"path": "parent", "parent": name, "shape": parent.shape, "tokens": spec.tokens}
        if spec.checkpoint is not None:
            content = {"checkpoint": parent.identity, "shape": sizes_of(parent.shape)}
            runtime = {"checkpoint": spec.checkpoint}
            stage = self.add(Stage("fetch", name, content, {}, 0, 0.0, runtime, facts))
        else:
            span = (self._before(name), self.start)
            rates = self.study.sweep.parent_rates if self.study.sweep else ()
            key = ("parent", name)
            stage = self.run_at_best(key, rates, name, parent.shape, span, "random", self.study.recipe, facts)
        self.evaluate(stage)
        return stage

    def _pruned(self, pruning: Pruning) -> Stage:
        study = self.study
        learned = isinstance(pruning.method, LearnedMethod)
        tokens = self._scored(pruning)
        first = self._before(pruning.parent)
        content = {
            "method": pruning.entry.method,
            "options": identity(pruning.method),
            "target": pruning.target.as_dict(),
            "calibration": identity(study.calibration),
            "seqlen": self.sequence,
            "slice": [first, self.start],
            **({"dtype": study.compute.dtype} if learned else {}),
        }
        facts = {**self._facts(pruning), "path": "pruned", "shape": pruning.after}
        flops = scoring_flops(pruning.before, pruning.after, pruning.method, tokens, self.sequence)
        inputs = {"corpus": self.corpus, "model": self.parents[pruning.parent]}
        stage = self.add(Stage("prune", pruning.label, content, inputs, tokens, flops, self.runtime(), facts))
        self.evaluate(stage)
        return stage

    def _facts(self, pruning: Pruning) -> dict[str, Any]:
        if pruning.method.granularity == "sparse":
            ratio = pruning.target.sparsity
        else:
            ratio = pruning.target.ratio or 1 - pruning.after.non_embedding / pruning.before.non_embedding
        return {
            "parent": pruning.parent,
            "method": pruning.entry.label,
            "granularity": pruning.granularity,
            "target": pruning.name,
            "ratio": ratio,
        }

    # --- cells ------------------------------------------------------------------------------------------------------

    def _pruned_run(self, comparison: PlannedComparison, pruned: Stage) -> Stage:
        """The retraining of a pruned model, P-R."""
        pruning, objective = comparison.pruning, comparison.objective
        tokens = self._retrained(comparison)
        recipe = dataclasses.replace(
            self.recipe_of(comparison), peak_rate=self.study.retrain.peak_rate or self.study.recipe.peak_rate
        )
        inputs: dict[str, Stage] = {"model": pruned}
        if objective.distill:
            inputs["teacher"] = self.parents[pruning.parent]
        facts = {**self._facts(pruning), **self._compared(comparison, "P-R", "pruned", "P-R"), "pruning": pruned}
        run = self.run(comparison, facts, pruning.after, self.start, tokens, "pruned", recipe, inputs, objective)
        self.evaluate(run)
        return run

    def _retrained(self, comparison: PlannedComparison) -> int:
        """The tokens of a pruned run: R, or fewer if the teacher's FLOPs count against those of R tokens."""
        objective, pruning = comparison.objective, comparison.pruning
        if objective.distill is None or objective.equal == "tokens":
            return comparison.tokens
        alone = 3 * pruning.after.forward_flops(self.sequence)
        return self._whole(comparison.tokens * alone / (alone + pruning.before.forward_flops(self.sequence)))

    def _twin(self, comparison: PlannedComparison, setting: SettingKind, pruned: Stage, run: Stage) -> None:
        """The same architecture from new weights; for a sparse model, under the same mask."""
        pruning = comparison.pruning
        first = self.start
        if setting in _EQUAL_TOTAL:
            if self.study.all_parents[pruning.parent].checkpoint is not None:
                raise UserError(
                    f"settings: {setting} needs a parent that the study pretrains, and that of {pruning.entry.label} "
                    "is a checkpoint; give this method settings without it"
                )
            first = self._before(pruning.parent)
        tokens = run.facts["cost"][0]
        if setting == "equal_total_tokens":
            tokens += self.start - first
        elif setting != "equal_training_tokens":
            spent = run.facts["cost"][1] + pruned.flops
            spent += self.parents[pruning.parent].facts["cost"][1] if setting == "equal_total_flops" else 0.0
            tokens = self._whole(spent / (3 * pruning.after.forward_flops(self.sequence)))
        sparse = pruning.method.granularity == "sparse"
        init = "redrawn" if sparse else "scratch"
        facts = {**self._facts(pruning), **self._compared(comparison, TWIN_NAMES[setting], init, "scratch")}
        facts |= {"pruning": pruned if sparse else None}
        inputs = {"plan": pruned} if sparse else self._like(pruning.parent)
        recipe = self.recipe_of(comparison)
        flops_equal = setting not in ("equal_training_tokens", "equal_total_tokens")
        stage = self.run(comparison, facts, pruning.after, first, tokens, init, recipe, inputs, ladder=not flops_equal)
        self.evaluate(stage)

    def _control(self, comparison: PlannedComparison, init: ControlKind, pruned: Stage) -> None:
        pruning = comparison.pruning
        shape, inputs = pruning.after, {"plan": pruned}
        if init == "shuffled-weights":
            inputs = {"model": pruned}
        elif init == "scratch":
            shape, inputs = pruning.before, self._like(pruning.parent)
        elif init == "dense-twin":
            zeroed = pruning.target.sparsity * pruning.before.block_weights / pruning.before.non_embedding
            shape, inputs = solve_width(pruning.before, zeroed), self._like(pruning.parent)
        facts = {**self._facts(pruning), **self._compared(comparison, init, init, "control")}
        facts |= {"pruning": pruned if init not in ("scratch", "dense-twin") else None}
        tokens, recipe = comparison.tokens, self.recipe_of(comparison)
        stage = self.run(comparison, facts, shape, self.start, tokens, init, recipe, inputs, ladder=False)
        self.evaluate(stage)

    def _compared(self, comparison: PlannedComparison, name: str, init: str, path: str) -> dict[str, Any]:
        seed = self.study.recipe.seed if comparison.seed is None else comparison.seed
        return {
            "path": path,
            "name": name,
            "init": init,
            "retrain_tokens": self._retrained(comparison),
            "budget": comparison.tokens,
            "objective": comparison.objective.label,
            "seed": seed,
        }

    def _like(self, parent: str) -> Inputs:
        """The input whose configuration a dense twin copies; none if the parent is the study's own Llama."""
        stage = self.parents[parent]
        return {"like": stage} if stage.kind == "fetch" else {}

    def _whole(self, tokens: float) -> int:
        """Round to whole windows, at least one."""
        return max(1, round(tokens / self.sequence)) * self.sequence


def trunk_savings(stages: Sequence[Stage]) -> tuple[int, int]:
    """Training tokens of a study's runs, and their number if no run shared a trunk."""
    trained = [stage for stage in unique(stages) if stage.kind == "train"]
    alone = sum(stage.facts["cost"][0] for stage in trained if stage.facts["path"] != "trunk")
    return sum(stage.tokens for stage in trained), alone
