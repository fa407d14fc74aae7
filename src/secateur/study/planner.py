"""From a study to its stages: a pure function. Nothing is read, run or written here.

The training split is cut by token index. A parent reads the P tokens before ``start``, what is scored on lies among
them, and what is retrained reads from ``start`` on; a twin at equal total tokens reads both.
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
from secateur.study.grid import TWIN_NAMES, PlannedComparison, Pruning, comparisons, prunings
from secateur.study.resolve import ResolvedStudy, split_places
from secateur.study.spec import ControlKind, SettingKind, StudySpec
from secateur.study.stage import Stage, unique
from secateur.study.training_runs import Inputs, TrainingRuns, sizes_of

__all__ = ["stages_of", "tokens_needed", "trunk_savings"]

_EQUAL_TOTAL = ("equal_total_tokens", "equal_total_flops")


def stages_of(study: StudySpec, known: ResolvedStudy) -> list[Stage]:
    """All stages of a study, each after its inputs.

    Several cells may need the same stage, e.g. when two ratios come to one shape: it is listed for each, under one
    fingerprint.

    Raises:
        UserError: if a parent has no shape at one of the targets, or a setting cannot be had.
    """
    return _Builder(study, known).build()


def tokens_needed(stages: Sequence[Stage]) -> int:
    """The tokens that the training split has to have."""
    return max((stage.identity["slice"][1] for stage in stages if "slice" in stage.identity), default=0)


class _Builder(TrainingRuns):
    def __init__(self, study: StudySpec, known: ResolvedStudy) -> None:
        asked, places = split_places(identity(study.text))
        corpus = Stage("corpus", "corpus", {**asked, "digest": known.corpus}, runtime=places)
        super().__init__(study, corpus, known.suite)
        self.known = known
        self.prunings = prunings(study, {name: parent.shape for name, parent in known.parents.items()})
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

    # --- what is trained on -----------------------------------------------------------------------------------------

    def _start(self) -> int:
        """The first token of all retraining: behind what any parent is pretrained on, or what is scored on."""
        own = [parent.tokens or 0 for parent in self.study.all_parents.values() if parent.checkpoint is None]
        if own:
            return max(own)
        return max(self._scored(pruning) for pruning in self.prunings)

    def _scored(self, pruning: Pruning) -> int:
        """Tokens that a method looks at, or trains on."""
        if isinstance(pruning.method, LearnedMethod):
            return pruning.method.tokens(self.sequence)
        return self.study.calibration.windows * self.sequence if pruning.method.calibrated else 0

    def _before(self, parent: str) -> int:
        """Where the tokens of a parent's pretraining begin."""
        spec = self.study.all_parents[parent]
        return self.start - (spec.tokens or 0) if spec.checkpoint is None else 0

    # --- parents and pruned models ----------------------------------------------------------------------------------

    def _parent(self, name: str) -> Stage:
        spec, found = self.study.all_parents[name], self.known.parents[name]
        facts = {"path": "parent", "parent": name, "shape": found.shape}
        if spec.checkpoint is not None:
            asked = {"checkpoint": found.identity, "shape": sizes_of(found.shape)}
            runtime = {"checkpoint": spec.checkpoint}
            stage = self.add(Stage("fetch", name, asked, {}, 0, 0.0, runtime, facts))
        else:
            span = (self._before(name), self.start)
            stage = self.train(name, found.shape, span, "random", self.study.recipe, facts)
        self.evaluate(stage)
        return stage

    def _pruned(self, pruning: Pruning) -> Stage:
        study = self.study
        learned = isinstance(pruning.method, LearnedMethod)
        tokens = self._scored(pruning)
        first = self._before(pruning.parent)
        asked = {
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
        stage = self.add(Stage("prune", pruning.label, asked, inputs, tokens, flops, self.runtime(), facts))
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
        """P-R."""
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
        """The tokens of a pruned run: R, or as many as its teacher leaves of the FLOPs that R takes without one."""
        objective, pruning = comparison.objective, comparison.pruning
        if objective.distill is None or objective.equal == "tokens":
            return comparison.tokens
        alone = 3 * pruning.after.forward_flops(self.sequence)
        return self._whole(comparison.tokens * alone / (alone + pruning.before.forward_flops(self.sequence)))

    def _twin(self, comparison: PlannedComparison, setting: SettingKind, pruned: Stage, run: Stage) -> None:
        """The same architecture from new weights; of a sparse model, under its mask."""
        pruning = comparison.pruning
        first = self.start
        if setting in _EQUAL_TOTAL:
            if self.study.all_parents[pruning.parent].checkpoint is not None:
                raise UserError(
                    f"settings: {setting} needs a parent that the study pretrains, and {pruning.entry.label} has a "
                    "checkpoint; give that method settings of its own, without it"
                )
            first = self._before(pruning.parent)
        tokens = run.facts["cost"][0]
        if setting == "equal_total_tokens":
            tokens += self.start - first
        elif setting != "equal_training_tokens":
            spent = run.facts["cost"][1] + pruned.flops
            spent += self.parents[pruning.parent].flops if setting == "equal_total_flops" else 0.0
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
            "objective": comparison.objective.label,
            "seed": seed,
        }

    def _like(self, parent: str) -> Inputs:
        """What a dense twin takes its configuration from: nothing where the parent is the study's own Llama."""
        stage = self.parents[parent]
        return {"like": stage} if stage.kind == "fetch" else {}

    def _whole(self, tokens: float) -> int:
        """To the nearest window."""
        return max(1, round(tokens / self.sequence)) * self.sequence


def trunk_savings(stages: Sequence[Stage]) -> tuple[int, int]:
    """Training tokens of a study's runs, and how many they would be if no run shared a trunk."""
    trained = [stage for stage in unique(stages) if stage.kind == "train"]
    alone = sum(stage.facts["cost"][0] for stage in trained if stage.facts["path"] != "trunk")
    return sum(stage.tokens for stage in trained), alone
