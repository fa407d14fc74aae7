"""The stages of a study, as a pure function: nothing is read, run or written.

The training split is cut by token index. A parent trains on the P tokens before ``start``; pruning scores use some of
them. A method that trains reads the L tokens from ``start`` on. Retraining begins behind them, at ``start`` where L is
zero. A twin at equal training tokens trains on the L tokens and those of retraining, one at equal total tokens on all
three parts; with ``data.twin: own-start`` each trains on as many tokens from the first on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.config import identity
from secateur.errors import UserError
from secateur.model.families import LLAMA
from secateur.model.shapes import Shape
from secateur.model.solver import solve_width
from secateur.pruning.cost import reconstruction_flops, scoring_flops
from secateur.pruning.iterations import PruningStep, split_tokens
from secateur.pruning.reconstruction import RATE
from secateur.study.grid import PlannedComparison, Pruning, comparisons, prunings, seed_shift
from secateur.study.resolve import ResolvedStudy, split_paths
from secateur.study.sections import CalibrationSpec, ControlKind
from secateur.study.settings import TWIN_NAMES, SettingKind
from secateur.study.spec import StudySpec
from secateur.study.stage import Stage, unique
from secateur.study.training_runs import Inputs, TrainingRuns, sizes_of
from secateur.training.recipe import Recipe

__all__ = ["stages_of", "tokens_needed", "trunk_savings"]

_EQUAL_TOTAL = ("equal_total_tokens", "equal_total_flops")
#: controls that rest on no pruned model
_WITHOUT_PRUNING = (
    "scratch",
    "dense-twin",
    "dense-active",
    "dense-total",
    "without-pruning-tokens",
    "parent-continued",
)


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
        shapes = {name: parent.shape for name, parent in resolved.parents.items()}
        self.cells = [(pruning, tuple(comparisons(study, pruning))) for pruning in prunings(study, shapes)]
        self.models = [self._models(*cells) for cells in self.cells]
        self.pretrains = any(parent.checkpoint is None for parent in study.all_parents.values())
        self.start = self._start()
        self.parents: dict[tuple[str, int | None], Stage] = {}  #: of a name and a seed; None: shared by all seeds
        for name, seed in self._parent_seeds():
            self.parents[name, seed] = self._parent(name, seed)

    def build(self) -> list[Stage]:
        for (_, cells), models in zip(self.cells, self.models, strict=True):
            in_steps = len(models[0].steps) > 1
            stages = {p.seed: self._pruned(p, measure=p is models[0]) for p in (() if in_steps else models)}
            for comparison in cells:
                if in_steps:
                    pruned, run = self._pruned_in_steps(comparison, measure=comparison is cells[0])
                else:
                    pruned = stages[comparison.pruning.seed]
                    run = self._pruned_run(comparison, pruned)
                for setting in comparison.settings:
                    self._twin(comparison, setting, pruned, run)
                for control in comparison.controls:
                    self._control(comparison, control, pruned)
        return self.stages

    # --- what seeds vary ----------------------------------------------------------------------------------------------

    def _models(self, pruning: Pruning, cells: Sequence[PlannedComparison]) -> list[Pruning]:
        """The pruned models of an entry at a target: one that all seeds share, or one for each seed that has a cell."""
        by_seed = {comparison.pruning.seed: comparison.pruning for comparison in cells}
        return list(by_seed.values()) if self.study.parents_vary else [pruning]

    def _parent_seeds(self) -> list[tuple[str, int | None]]:
        """Each parent with each seed that a pruned model needs; with None where all seeds share it, as a checkpoint."""
        pairs: list[tuple[str, int | None]] = []
        for name, spec in self.study.all_parents.items():
            seeds = [pruning.seed for models in self.models for pruning in models if pruning.parent == name]
            shared = spec.checkpoint is not None or not seeds
            pairs += [(name, seed) for seed in dict.fromkeys([None] if shared else seeds)]
        return pairs

    def _parent_of(self, pruning: Pruning) -> Stage:
        checkpoint = self.study.all_parents[pruning.parent].checkpoint
        return self.parents[pruning.parent, pruning.seed if checkpoint is None else None]

    # --- slices of the training split --------------------------------------------------------------------------------

    def _start(self) -> int:
        """The first token of all retraining: after the tokens of pretraining or, for checkpoints, of scoring."""
        pretraining = [parent.tokens or 0 for parent in self.study.all_parents.values() if parent.checkpoint is None]
        if pretraining:
            return max(pretraining)
        slices = [p for p, _ in self.cells if p.training_tokens(self.sequence) or not self._calibration(p).source]
        return max((self._scored(pruning) for pruning in slices), default=0)

    def _scored(self, pruning: Pruning) -> int:
        """Tokens that a method scores or trains on; the larger number, where the same slice serves both."""
        scored = self._calibrated(pruning)
        learned = pruning.training_tokens(self.sequence)
        return learned if pruning.learns else max(learned, scored)

    def _calibrated(self, pruning: Pruning) -> int:
        """Tokens that a method scores on."""
        calibration = self._calibration(pruning)
        return calibration.windows * (calibration.seqlen or self.sequence) if pruning.method.calibrated else 0

    def _calibration(self, pruning: Pruning) -> CalibrationSpec:
        return self.study.calibration_of(pruning.entry)

    def _reading(self, pruning: Pruning) -> dict[str, Any]:
        """The part of a stage's identity that says what its method scores on; a source is identified by its digest."""
        calibration = self._calibration(pruning)
        seed = calibration.seed + seed_shift(self.study, pruning.seed)
        content = identity(dataclasses.replace(calibration, seed=seed, seqlen=None))
        if calibration.source is None:
            return {"calibration": content, "slice": [self._before(pruning.parent), self.start]}
        content["source"] = self.resolved.calibration[calibration.source, calibration.field]
        if calibration.protocol == "stream":
            del content["seed"]  # the first tokens, whatever the seed
        return {"calibration": content}

    def _learning(self, pruning: Pruning) -> tuple[int, int]:
        """The slice that pruning itself trains on; empty for a method that does not train.

        Retraining begins at its end. The slice begins behind the parents' pretraining or, if none is pretrained, ends
        where the retraining of other methods begins.
        """
        tokens = pruning.training_tokens(self.sequence)
        first = self.start if self.pretrains else self.start - tokens
        return first, first + tokens

    def _before(self, parent: str) -> int:
        """The first token of a parent's pretraining."""
        spec = self.study.all_parents[parent]
        return self.start - (spec.tokens or 0) if spec.checkpoint is None else 0

    # --- parents and pruned models ----------------------------------------------------------------------------------

    def _parent(self, name: str, seed: int | None) -> Stage:
        spec, parent = self.study.all_parents[name], self.resolved.parents[name]
        facts = {"path": "parent", "parent": name, "shape": parent.shape, "tokens": spec.tokens, "seed": seed}
        facts["config"] = spec.config
        if spec.checkpoint is not None:
            content = {"checkpoint": parent.identity, "shape": sizes_of(parent.shape)}
            runtime = {"checkpoint": spec.checkpoint}
            stage = self.add(Stage("fetch", name, content, {}, 0, 0.0, runtime, facts))
        else:
            span, recipe = (self._before(name), self.start), self.study.recipe
            if seed not in (None, recipe.seed):
                recipe = dataclasses.replace(recipe, seed=seed, data_seed=seed)
            key, rates = ("parent", name), self.study.sweep.parent_rates if self.study.sweep else ()
            title = _seed_name(name, seed)
            stage = self.run_at_best(key, rates, title, parent.shape, span, "random", recipe, facts)
        self.evaluate(stage, cost=name not in [parent for parent, _ in self.parents])
        return stage

    def _pruned(self, pruning: Pruning, measure: bool) -> Stage:
        """Add a pruned model; ``measure``: also what it costs to run, which is the same for all seeds."""
        (step,), facts = pruning.steps, {"path": "pruned", "seed": pruning.seed, "before": ()}
        name = _seed_name(pruning.label, pruning.seed)
        stage = self._prune(name, pruning, step, {"model": self._parent_of(pruning)}, facts)
        self.evaluate(stage, cost=measure)
        return stage

    def _prune(self, name: str, pruning: Pruning, step: PruningStep, inputs: Inputs, more: Mapping[str, Any]) -> Stage:
        """Add a step of a pruning, which may be its only one.

        Args:
            inputs: the model and, if a step went before, the pruned model that has its masks.
            more: facts about the stage.
        """
        study, calibration = self.study, self._calibration(pruning)
        learned = pruning.training_tokens(self.sequence)
        seqlen = self.sequence if pruning.learns else calibration.seqlen or self.sequence
        reading: dict[str, Any] = {"slice": list(self._learning(pruning)), "dtype": study.compute.dtype}
        content = {
            "method": pruning.entry.method,
            "options": identity(pruning.method),
            "target": step.target.as_dict(),
            "seqlen": seqlen,
            **(reading if pruning.learns else self._reading(pruning)),
        }
        if pruning.entry.reconstruct:
            tuning = self._tuning(
                self._learning(pruning), RATE, study.recipe.data_seed if pruning.seed is None else pruning.seed
            )
            content["reconstruct"] = {"seqlen": self.sequence, **tuning}
        if step.before.family.pattern and pruning.method.granularity == "depth":
            content["layer_pattern"] = step.before.family.pattern  # decides which layers go, unless turned off
        facts = {**self._facts(pruning), "shape": step.after, "training_tokens": learned, **more}
        tokens = learned if pruning.learns else self._calibrated(pruning)
        how: dict[str, Any] = {"propagate": step.target.propagate, "allocation": step.target.allocation}
        flops = scoring_flops(step.before, step.after, pruning.method, tokens, seqlen, **how)
        runtime = {**self.runtime(), "calibration": calibration.source}
        if pruning.entry.reconstruct:
            tokens, flops = tokens + learned, flops + self._reconstruction_flops(pruning, learned)
            runtime["processes"] = 1
        return self.add(Stage("prune", name, content, {"corpus": self.corpus, **inputs}, tokens, flops, runtime, facts))

    def _facts(self, pruning: Pruning) -> dict[str, Any]:
        if pruning.method.granularity == "sparse":
            ratio = pruning.target.sparsity
        else:
            ratio = pruning.target.ratio or 1 - pruning.after.non_embedding / pruning.before.non_embedding
        return {
            "parent": pruning.parent,
            "config": self.study.all_parents[pruning.parent].config,
            "method": pruning.entry.label,
            "granularity": pruning.granularity,
            "target": pruning.name,
            "ratio": ratio,
            "series": pruning.series,
            "steps": tuple(step.ratio for step in pruning.steps),
            "schedule": pruning.entry.iteration_schedule,
        }

    # --- cells ------------------------------------------------------------------------------------------------------

    def _pruned_run(self, comparison: PlannedComparison, pruned: Stage) -> Stage:
        """The retraining of a pruned model, P-R."""
        pruning, objective = comparison.pruning, comparison.objective
        tokens = self._retrained(comparison)
        if objective.kind == "reconstruct":
            return self._reconstructed_run(comparison, pruned, tokens)
        recipe = self._retraining_recipe(comparison)
        first = self._learning(pruning)[1]
        teacher = self._teacher(comparison, (first, first + tokens), recipe)
        inputs = {"model": pruned, **teacher}
        facts = {**self._facts(pruning), **self._compared(comparison, "P-R", "pruned", "P-R"), "pruning": pruned}
        facts |= {"teaching": teacher["teacher"]} if objective.teacher == "saved" else {}
        run = self.run(comparison, facts, pruning.after, first, tokens, "pruned", recipe, inputs, objective)
        self.evaluate(run)
        return run

    def _reconstructed_run(self, comparison: PlannedComparison, pruned: Stage, tokens: int) -> Stage:
        """The reconstruction of a pruned model's blocks, each token of the slice read once by each part of a block."""
        pruning, rate = comparison.pruning, comparison.objective.reconstruction_rate
        if tokens % self.sequence:
            raise UserError(
                f"retrain.tokens: reconstruction reads whole windows, and {tokens:,} is no multiple of recipe.sequence "
                f"{self.sequence}"
            )
        flops = self._reconstruction_flops(pruning, tokens)
        facts = {**self._facts(pruning), **self._compared(comparison, "P-R", "pruned", "P-R"), "pruning": pruned}
        facts |= {"shape": pruning.after, "cost": (tokens, flops), "before": (), "peak_rate": rate}
        first = self._learning(pruning)[1]
        seed = self.recipe_of(comparison).data_seed
        content = {"seqlen": self.sequence, "dtype": self.study.compute.dtype}
        content |= self._tuning((first, first + tokens), rate, seed)
        inputs = {"corpus": self.corpus, "model": pruned, "dense": self._parent_of(pruning)}
        runtime = {**self.runtime(), "processes": 1}
        name = self.name_of(comparison, "P-R")
        run = self.add(Stage("reconstruct", name, content, inputs, tokens, flops, runtime, facts))
        self.evaluate(run)
        return run

    def _tuning(self, span: tuple[int, int], rate: float, seed: int) -> dict[str, Any]:
        """The identity of a reconstruction: its slice, in steps of the recipe's size, in an order that a seed fixes."""
        return {"slice": list(span), "tokens_per_step": self.study.recipe.tokens_per_step, "rate": rate, "seed": seed}

    def _reconstruction_flops(self, pruning: Pruning, tokens: int) -> float:
        return reconstruction_flops(pruning.before, pruning.after, tokens, tokens, self.sequence)

    def _pruned_in_steps(self, comparison: PlannedComparison, measure: bool) -> tuple[Stage, Stage]:
        """Add prunings and recoveries by turns: the last pruned model, and the last recovery, which is the run P-R.

        The recoveries read the tokens of a retraining one after the other, each with the whole schedule of the recipe.
        """
        pruning, recipe, objective = comparison.pruning, self._retraining_recipe(comparison), comparison.objective
        parts = self._recoveries(comparison)
        seeds = len(self.study.seeds_of(pruning.entry)) > 1
        compared = self._compared(comparison, "P-R", "pruned", "P-R")
        seed, first = compared["seed"] if seeds else pruning.seed, self._learning(pruning)[1]
        teacher = self._teacher(comparison, (first, first + sum(parts)), recipe)
        inputs: dict[str, Stage] = {"model": self._parent_of(pruning)}
        prunings, runs = list[Stage](), list[Stage]()
        for number, (step, tokens) in enumerate(zip(pruning.steps, parts, strict=True), start=1):
            last, name = number == len(parts), self.name_of(comparison, f"step-{number}")
            facts: dict[str, Any] = {"path": "pruned" if last else "pruning-step", "seed": seed}
            pruned = self._prune(name, pruning, step, inputs, {**facts, "before": tuple(prunings)})
            facts = {**self._facts(pruning), **compared, "pruning": pruned} if last else {"path": "recovery"}
            facts |= {"teaching": teacher["teacher"]} if last and objective.teacher == "saved" else {}
            facts["config"] = self._facts(pruning)["config"]
            name = self.name_of(comparison, "P-R") if last else name
            span, start = (first, first + tokens), {"model": pruned, **teacher}
            run = self.train(
                name, step.after, span, "pruned", recipe, facts, start, objective, before=tuple(runs) if last else ()
            )
            prunings.append(pruned)
            runs.append(run)
            inputs, first = {"model": run, "masks": pruned}, first + tokens
        self.evaluate(prunings[-1], cost=measure)
        self.evaluate(runs[-1])
        return prunings[-1], runs[-1]

    def _recoveries(self, comparison: PlannedComparison) -> tuple[int, ...]:
        """The tokens of each recovery."""
        tokens, iterations = self._retrained(comparison), len(comparison.pruning.steps)
        try:
            return split_tokens(tokens, iterations, self.study.recipe.tokens_per_step)
        except UserError as error:
            raise UserError(f"methods ({comparison.pruning.label}): {error}") from None

    def _teacher(self, comparison: PlannedComparison, span: tuple[int, int], recipe: Recipe) -> dict[str, Stage]:
        """The input that a run on the tokens ``span`` is distilled from; none for the language-model loss."""
        objective = comparison.objective
        if objective.distill is None:
            return {}
        parent = self._parent_of(comparison.pruning)
        return {"teacher": self.teaching(parent, span, recipe, objective) if objective.teacher == "saved" else parent}

    def _retraining_recipe(self, comparison: PlannedComparison) -> Recipe:
        """The recipe of pruned runs, which have a peak rate of their own, and so has an adapter."""
        adapter = comparison.objective.adapter
        rates = (adapter.peak_rate if adapter else None, self.study.retrain.peak_rate, self.study.recipe.peak_rate)
        peak_rate = next(rate for rate in rates if rate)
        return dataclasses.replace(self.recipe_of(comparison), peak_rate=peak_rate)

    def _retrained(self, comparison: PlannedComparison) -> int:
        """The tokens of a pruned run: R, or fewer if the teacher's FLOPs count against those of R tokens."""
        objective, pruning = comparison.objective, comparison.pruning
        if objective.kind == "language-model" or objective.equal == "tokens":
            return comparison.tokens
        alone = 3 * sum(step.after.forward_flops(self.sequence) for step in pruning.steps) / len(pruning.steps)
        if objective.kind == "reconstruct":
            return self._whole(comparison.tokens * alone / self._reconstruction_flops(pruning, 1))
        return self._whole(comparison.tokens * alone / (alone + pruning.before.forward_flops(self.sequence)))

    def _twin(self, comparison: PlannedComparison, setting: SettingKind, pruned: Stage, run: Stage) -> None:
        """The same architecture from new weights; for a sparse model, under the same mask."""
        pruning = comparison.pruning
        first, retraining = self._learning(pruning)
        if setting in _EQUAL_TOTAL:
            if self.study.all_parents[pruning.parent].checkpoint is not None:
                raise UserError(
                    f"settings: {setting} needs a parent that the study pretrains, and that of {pruning.entry.label} "
                    "is a checkpoint; give this method settings without it"
                )
            first = self._before(pruning.parent)
        tokens = run.facts["cost"][0]
        if setting in ("equal_training_tokens", "equal_total_tokens"):
            tokens += retraining - first
        else:
            spent = run.facts["cost"][1] + pruned.flops + sum(stage.flops for stage in pruned.facts["before"])
            spent += run.facts["teaching"].flops if "teaching" in run.facts else 0.0
            spent += self._parent_of(pruning).facts["cost"][1] if setting == "equal_total_flops" else 0.0
            tokens = self._whole(spent / (3 * pruning.after.forward_flops(self.sequence)))
        if (pruning.entry.data or self.study.data).twin == "own-start":
            first = 0
        sparse = pruning.method.granularity == "sparse"
        init = self.study.twin_init_of(pruning.entry) if sparse else "scratch"
        facts = {**self._facts(pruning), **self._compared(comparison, TWIN_NAMES[setting], init, "scratch")}
        facts |= {"pruning": pruned if sparse else None}
        inputs = {"plan": pruned} if sparse else self._like(pruning)
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
            shape, inputs = pruning.before, self._like(pruning)
        elif init == "dense-twin":
            zeroed = pruning.target.sparsity * pruning.before.block_weights / pruning.before.non_embedding
            shape, inputs = solve_width(pruning.before, zeroed), self._like(pruning)
        elif init in ("dense-active", "dense-total"):
            shape, inputs = self._dense_model(pruning, init), {}
        elif init == "without-pruning-tokens":
            inputs = self._like(pruning)
        elif init == "parent-continued":
            shape, inputs = pruning.before, {"model": self._parent_of(pruning)}
        facts = {**self._facts(pruning), **self._compared(comparison, init, init, "control")}
        facts |= {"pruning": None if init in _WITHOUT_PRUNING else pruned}
        first, tokens, recipe = self._learning(pruning)[1], comparison.tokens, self.recipe_of(comparison)
        if init == "parent-continued":
            recipe = self._retraining_recipe(comparison)
        stage = self.run(comparison, facts, shape, first, tokens, init, recipe, inputs, ladder=False)
        self.evaluate(stage)

    def _dense_model(self, pruning: Pruning, init: ControlKind) -> Shape:
        """A Llama with as many parameters as the pruned mixture: those of a token, or all of them."""
        if self._like(pruning):
            raise UserError(f"controls: {init} needs a parent that the study pretrains, and it is a checkpoint")
        mixture = pruning.after
        experts = mixture.active if init == "dense-active" else mixture.experts
        ffn = experts * mixture.expert_ffn + round(mixture.experts / 3)  # a router's row is a third of an FFN channel
        return dataclasses.replace(mixture, ffn=ffn, experts=0, expert_ffn=0, active=0, family=LLAMA)

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

    def _like(self, pruning: Pruning) -> Inputs:
        """The input whose configuration a dense twin copies; none if the parent is the study's own Llama."""
        stage = self._parent_of(pruning)
        return {"like": stage} if stage.kind == "fetch" else {}

    def _whole(self, tokens: float) -> int:
        """Round to whole windows, at least one."""
        return max(1, round(tokens / self.sequence)) * self.sequence


def _seed_name(name: str, seed: int | None) -> str:
    """The name of a parent or a pruned model, e.g. ``wanda-0.5~s1``; without a seed if all seeds share it."""
    return name if seed is None else f"{name}~s{seed}"


def trunk_savings(stages: Sequence[Stage]) -> tuple[int, int]:
    """Training tokens of a study's runs, and their number if no run shared a trunk."""
    trained = [stage for stage in unique(stages) if stage.kind in ("train", "reconstruct")]
    alone = sum(stage.facts["cost"][0] for stage in trained if stage.facts["path"] not in ("trunk", "recovery"))
    return sum(stage.tokens for stage in trained), alone
