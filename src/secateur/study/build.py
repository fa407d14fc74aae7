"""From a study to its stages: a pure function. Nothing is read, run or written here.

The training split is cut by token index. A parent reads the P tokens before ``start``, what is scored on lies among
them, and what is retrained reads from ``start`` on; a twin at equal total tokens reads both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import UserError
from secateur.methods import LearnedMethod
from secateur.prune import scoring_flops
from secateur.shapes import Shape, solve_width, teacher_flops, train_flops
from secateur.spec import identity
from secateur.study.cells import PATHS, Comparison, Pruning, comparisons, prunings
from secateur.study.resolve import Known
from secateur.study.spec import ControlKind, Objective, SettingKind, Study
from secateur.study.stages import Stage, unique
from secateur.train.optim import Recipe

__all__ = ["saved_by_trunks", "stages_of", "tokens_needed"]

Inputs = Mapping[str, Stage]
_EQUAL_TOTAL = ("equal_total_tokens", "equal_total_flops")


def stages_of(study: Study, known: Known) -> list[Stage]:
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


class _Builder:
    def __init__(self, study: Study, known: Known) -> None:
        self.study, self.known = study, known
        self.stages: list[Stage] = []
        self.sequence = study.recipe.sequence
        self.prunings = prunings(study, {name: parent.shape for name, parent in known.parents.items()})
        self.start = self._start()
        self.corpus = self._add(Stage("corpus", "corpus", {**identity(study.text), "digest": known.corpus}))
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
            asked = {"checkpoint": found.identity, "shape": _sizes(found.shape)}
            runtime = {"checkpoint": spec.checkpoint}
            stage = self._add(Stage("fetch", name, asked, {}, 0, 0.0, runtime, facts))
        else:
            span = (self._before(name), self.start)
            stage = self._train(name, found.shape, span, "random", self.study.recipe, facts)
        self._evaluate(stage)
        return stage

    def _pruned(self, pruning: Pruning) -> Stage:
        target, study = pruning.target, self.study
        learned = isinstance(pruning.method, LearnedMethod)
        tokens = self._scored(pruning)
        first = self._before(pruning.parent)
        asked = {
            "method": pruning.entry.method,
            "options": identity(pruning.method),
            "target": {
                "ratio": target.ratio,
                "of": target.of,
                "sizes": dict(target.sizes),
                "pattern": str(target.pattern) if target.pattern else None,
                "axes": list(target.axes),
                "allocation": target.allocation,
            },
            "calibration": identity(study.calibration),
            "seqlen": self.sequence,
            "slice": [first, self.start],
            **({"dtype": study.compute.dtype} if learned else {}),
        }
        facts = {**self._facts(pruning), "path": "pruned", "shape": pruning.after}
        flops = scoring_flops(pruning.before, pruning.after, pruning.method, tokens, self.sequence)
        inputs = {"corpus": self.corpus, "model": self.parents[pruning.parent]}
        stage = self._add(Stage("prune", pruning.label, asked, inputs, tokens, flops, self._runtime(), facts))
        self._evaluate(stage)
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

    def _pruned_run(self, comparison: Comparison, pruned: Stage) -> Stage:
        """P-R."""
        pruning, objective = comparison.pruning, comparison.objective
        tokens = self._retrained(comparison)
        recipe = dataclasses.replace(
            self._recipe(comparison), peak_rate=self.study.retrain.peak_rate or self.study.recipe.peak_rate
        )
        inputs: dict[str, Stage] = {"model": pruned}
        if objective.distill:
            inputs["teacher"] = self.parents[pruning.parent]
        facts = {**self._facts(pruning), **self._compared(comparison, "P-R", "pruned", "P-R"), "pruning": pruned}
        run = self._runs(comparison, facts, pruning.after, self.start, tokens, "pruned", recipe, inputs, objective)
        self._evaluate(run)
        return run

    def _retrained(self, comparison: Comparison) -> int:
        """The tokens of a pruned run: R, or as many as its teacher leaves of the FLOPs that R takes without one."""
        objective, pruning = comparison.objective, comparison.pruning
        if objective.distill is None or objective.equal == "tokens":
            return comparison.tokens
        alone = 3 * pruning.after.forward_flops(self.sequence)
        return self._whole(comparison.tokens * alone / (alone + pruning.before.forward_flops(self.sequence)))

    def _twin(self, comparison: Comparison, setting: SettingKind, pruned: Stage, run: Stage) -> None:
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
        facts = {**self._facts(pruning), **self._compared(comparison, PATHS[setting], init, "scratch")}
        facts |= {"pruning": pruned if sparse else None}
        inputs = {"plan": pruned} if sparse else self._like(pruning.parent)
        recipe = self._recipe(comparison)
        flops_equal = setting not in ("equal_training_tokens", "equal_total_tokens")
        stage = self._runs(
            comparison, facts, pruning.after, first, tokens, init, recipe, inputs, ladder=not flops_equal
        )
        self._evaluate(stage)

    def _control(self, comparison: Comparison, init: ControlKind, pruned: Stage) -> None:
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
        tokens, recipe = comparison.tokens, self._recipe(comparison)
        stage = self._runs(comparison, facts, shape, self.start, tokens, init, recipe, inputs, ladder=False)
        self._evaluate(stage)

    def _compared(self, comparison: Comparison, name: str, init: str, path: str) -> dict[str, Any]:
        seed = self.study.recipe.seed if comparison.seed is None else comparison.seed
        return {
            "path": path,
            "name": name,
            "init": init,
            "retrain_tokens": self._retrained(comparison),
            "objective": comparison.objective.label,
            "seed": seed,
        }

    def _recipe(self, comparison: Comparison) -> Recipe:
        if comparison.seed is None:
            return self.study.recipe
        return dataclasses.replace(self.study.recipe, seed=comparison.seed, data_seed=comparison.seed)

    def _like(self, parent: str) -> Inputs:
        """What a dense twin takes its configuration from: nothing where the parent is the study's own Llama."""
        stage = self.parents[parent]
        return {"like": stage} if stage.kind == "fetch" else {}

    # --- runs -------------------------------------------------------------------------------------------------------

    def _runs(
        self,
        comparison: Comparison,
        facts: Mapping[str, Any],
        shape: Shape,
        first: int,
        tokens: int,
        init: str,
        recipe: Recipe,
        inputs: Inputs,
        objective: Objective | None = None,
        *,
        ladder: bool = True,
    ) -> Stage:
        """One trained model: in one run, or as the end of a trunk that its ladder shares, at a rate that was swept."""
        name = self._name(comparison, facts["name"])
        span = (first, first + tokens)
        if self.study.retrain.trunk == "shared" and ladder:
            return self._branch(name, comparison, facts, shape, span, init, recipe, inputs, objective)
        if self.study.sweep:
            inputs = {**inputs, "rate": self._sweep(comparison, facts, shape, init, recipe, inputs, objective)}
            facts = {**facts, "sweep": inputs["rate"]}
        return self._train(name, shape, span, init, recipe, facts, inputs, objective)

    def _name(self, comparison: Comparison, path: str) -> str:
        entry = comparison.pruning.entry
        parts = [f"{comparison.pruning.label}/{path}"]
        if len(entry.tokens or self.study.retrain.tokens) > 1:
            parts.append(f"@{_short(comparison.tokens)}")
        if comparison.objective.label:
            parts.append(f"+{comparison.objective.label}")
        if len(entry.seeds or self.study.seeds) > 1:
            parts.append(f"~s{comparison.seed}")
        return "".join(parts)

    def _branch(
        self,
        name: str,
        comparison: Comparison,
        facts: Mapping[str, Any],
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        inputs: Inputs,
        objective: Objective | None,
    ) -> Stage:
        """The decay of one budget, behind the segments of the trunk that the smaller budgets of its ladder need too."""
        first, stop = span
        more = [t - comparison.tokens for t in comparison.pruning.entry.tokens or self.study.retrain.tokens]
        ends = sorted(stop + difference for difference in more if difference <= 0)
        step = recipe.tokens_per_step
        forks = [first + math.floor((1 - recipe.decay) * (end - first) / step) * step for end in ends]
        warm = recipe.warmup * (ends[0] - first) / max(step, forks[0] - first)
        at, chain = first, dict(inputs)
        before: tuple[Stage, ...] = ()
        for number, fork in enumerate(dict.fromkeys(forks)):
            if fork == at:
                continue
            trunk = dataclasses.replace(recipe, schedule="constant", warmup=min(0.99, warm) if number == 0 else 0.0)
            named = f"{name.partition('@')[0]}/trunk@{_short(fork - first)}"
            kind = init if at == first else "continued"
            stage = self._train(
                named, shape, (at, fork), kind, trunk, {"path": "trunk", "shape": shape}, chain, objective
            )
            before = (*before, stage)
            chain, at = {**inputs, "model": stage}, fork
            if facts["init"] == "redrawn":
                chain["plan"] = inputs["plan"]
        decay = dataclasses.replace(recipe, schedule="linear", warmup=0.0)
        return self._train(
            name, shape, (at, stop), "continued" if at > first else init, decay, facts, chain, objective, before=before
        )

    def _sweep(
        self,
        comparison: Comparison,
        facts: Mapping[str, Any],
        shape: Shape,
        init: str,
        recipe: Recipe,
        inputs: Inputs,
        objective: Objective | None,
    ) -> Stage:
        """Trials at each rate, and the choice among them: for an architecture and a path, whatever the budget."""
        sweep = self.study.sweep
        assert sweep
        budgets = comparison.pruning.entry.tokens or self.study.retrain.tokens
        tokens = sweep.tokens or min(budgets)
        first = self.study.recipe if comparison.seed is None else self._recipe(comparison)
        label = f"{comparison.pruning.label}/sweep-{facts['init']}" + ("-kd" if objective and objective.distill else "")
        skip = self.study.evaluation.windows
        trials = {}
        for rate in sweep.rates:
            tried = dataclasses.replace(recipe, peak_rate=rate, seed=first.seed, data_seed=first.data_seed)
            told = {"path": "trial", "shape": shape}
            span = (self.start, self.start + tokens)
            trials[f"{rate:g}"] = self._train(
                f"{label}@{rate:g}", shape, span, init, tried, told, inputs, objective, held_out=(skip, sweep.windows)
            )
        asked = {"rates": [float(rate) for rate in sweep.rates]}
        return self._add(Stage("select", label, asked, trials, facts={"trials": tuple(trials.values())}))

    def _train(
        self,
        name: str,
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        facts: Mapping[str, Any],
        inputs: Inputs = {},  # noqa: B006 - never changed
        objective: Objective | None = None,
        *,
        before: tuple[Stage, ...] = (),
        held_out: tuple[int, int] | None = None,
    ) -> Stage:
        """A run over the tokens ``span``.

        Args:
            name: of the stage.
            shape: of the model.
            span: its tokens.
            init: where its weights are from.
            recipe: how it is trained; its rate counts unless ``inputs`` have a ``rate``.
            facts: what the report needs to know.
            inputs: role -> stage.
            objective: what is minimised; None for the language-model loss.
            before: the runs that it continues.
            held_out: windows passed over, and windows measured; None for those of the final figures.
        """
        study = self.study
        told, fresh = identity(recipe), init in ("random", "scratch", "dense-twin")
        if init in ("pruned", "continued", "shuffled-weights"):  # nothing is drawn: nothing of the drawing is identity
            unused = ("init_std",) if init == "shuffled-weights" else ("init_std", "seed")
            told = {key: value for key, value in told.items() if key not in unused}
        if "rate" in inputs:
            told["peak_rate"] = None
        skip, windows = held_out or (0, study.evaluation.windows)
        points = study.evaluation.points if held_out is None and facts["path"] != "trunk" else 1
        tokens = span[1] - span[0]
        distill = objective.distill if objective else None
        flops = train_flops(shape, tokens, self.sequence)
        if distill:
            flops += teacher_flops(inputs["teacher"].facts["shape"], tokens, self.sequence)
        asked = {
            "init": "scratch" if fresh else init,
            "shape": _sizes(shape) if fresh else None,
            "slice": list(span),
            "recipe": told,
            "dtype": study.compute.dtype,
            "evaluation": {"skip": skip, "windows": windows, "points": points},
            **({"objective": identity(distill)} if distill else {}),
            **({"keep": "state"} if facts["path"] == "trunk" else {}),
        }
        runtime = {**self._runtime(), "micro_batch": recipe.micro_batch}
        cost = (sum(s.tokens for s in before) + tokens, sum(s.flops for s in before) + flops)
        rate = None if "rate" in inputs else recipe.peak_rate
        known = {**facts, "shape": shape, "cost": cost, "before": before, "peak_rate": rate}
        return self._add(Stage("train", name, asked, {"corpus": self.corpus, **inputs}, tokens, flops, runtime, known))

    def _runtime(self) -> dict[str, Any]:
        compute = self.study.compute
        keys = ("device", "processes", "replicas", "recompute", "compile")
        return {key: getattr(compute, key) for key in keys}

    def _evaluate(self, model: Stage) -> None:
        study = self.study
        name = f"{model.name}/pruned" if model.kind == "prune" else model.name
        asked = {"windows": study.evaluation.windows, "seqlen": self.sequence}
        inputs = {"corpus": self.corpus, "model": model}
        runtime = {"device": study.compute.device}
        self._add(Stage("evaluate", name, asked, inputs, runtime=runtime, facts={"of": model.fingerprint}))

    def _whole(self, tokens: float) -> int:
        """To the nearest window."""
        return max(1, round(tokens / self.sequence)) * self.sequence

    def _add(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        return stage


def saved_by_trunks(stages: Sequence[Stage]) -> tuple[int, int]:
    """Training tokens of a study's runs, and how many they would be if no run shared a trunk."""
    trained = [stage for stage in unique(stages) if stage.kind == "train"]
    alone = sum(stage.facts["cost"][0] for stage in trained if stage.facts["path"] != "trunk")
    return sum(stage.tokens for stage in trained), alone


def _sizes(shape: Shape) -> Any:
    fields = dataclasses.fields(shape)
    return identity({f.name: getattr(shape, f.name) for f in fields if f.name != "family"})


def _short(tokens: int) -> str:
    """``400k``, ``1.5M``, ``52.4288B``; in full where that would be inexact."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        text = f"{tokens / unit:.6g}"
        if tokens >= unit and round(float(text) * unit) == tokens:
            return f"{text}{suffix}"
    return str(tokens)
