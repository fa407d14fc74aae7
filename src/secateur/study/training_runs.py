"""Training runs as stages: each with its own schedule or on a shared trunk, at a fixed or a swept rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from secateur.config import identity
from secateur.errors import UserError
from secateur.evaluation.workload import Workload
from secateur.model.quantisation import WEIGHT_FORMATS
from secateur.model.shapes import Shape, teacher_flops
from secateur.study.grid import PlannedComparison
from secateur.study.sections import ObjectiveSpec
from secateur.study.spec import StudySpec
from secateur.study.stage import Stage
from secateur.training.adapter import training_flops
from secateur.training.logits_size import logits_size
from secateur.training.recipe import Recipe

__all__ = ["Inputs", "TrainingRuns", "sizes_of"]

Inputs = Mapping[str, Stage]

#: inits without any part of another model
_FRESH = ("random", "scratch", "dense-twin", "dense-active", "dense-total", "without-pruning-tokens")


class TrainingRuns:
    """The stages of a study under construction, with methods that add runs and measurements.

    Args:
        suite: measurements of every model besides its held-out loss, with the digests of their data.
    """

    def __init__(self, study: StudySpec, corpus: Stage, suite: Mapping[str, Any]) -> None:
        self.study, self.corpus, self.suite = study, corpus, suite
        self.sequence = study.recipe.sequence
        self.start = 0  #: the first token of all retraining
        self.stages = [corpus]
        self.choices: dict[Hashable, Stage] = {}  #: what a rate was chosen for, at any seed -> the choice

    def recipe_of(self, comparison: PlannedComparison) -> Recipe:
        if comparison.seed is None:
            return self.study.recipe
        return dataclasses.replace(self.study.recipe, seed=comparison.seed, data_seed=comparison.seed)

    def run(
        self,
        comparison: PlannedComparison,
        facts: Mapping[str, Any],
        shape: Shape,
        first: int,
        tokens: int,
        init: str,
        recipe: Recipe,
        inputs: Inputs,
        objective: ObjectiveSpec | None = None,
        *,
        ladder: bool = True,
    ) -> Stage:
        """Add the stages of one trained model: sweep and run, or a branch of the ladder's trunk."""
        name = self.name_of(comparison, facts["name"])
        span = (first, first + tokens)
        if self.study.retrain.trunk == "shared" and ladder:
            return self._branch(name, comparison, facts, shape, span, init, recipe, inputs, objective)
        entry, rates = comparison.pruning.entry, self.study.sweep.rates if self.study.sweep else ()
        key = (entry.label, comparison.pruning.name, facts["name"], comparison.tokens, comparison.objective.label)
        return self.run_at_best(key, rates, name, shape, span, init, recipe, facts, inputs, objective)

    def name_of(self, comparison: PlannedComparison, path: str) -> str:
        """The name of a comparison's run, such as ``wanda-0.5/P-R@400k+distill~s1``."""
        entry, pruning = comparison.pruning.entry, comparison.pruning
        shared = path == "parent-continued" and not pruning.training_tokens(self.sequence)  # by methods of one parent
        parts = [f"{pruning.parent if shared else pruning.label}/{path}"]
        if len(entry.tokens or self.study.retrain.tokens) > 1:
            parts.append(f"@{_short(comparison.tokens)}")
        if comparison.objective.label:
            parts.append(f"+{comparison.objective.label}")
        if len(self.study.seeds_of(entry)) > 1:
            parts.append(f"~s{comparison.seed}")
        return "".join(parts)

    def _branch(
        self,
        name: str,
        comparison: PlannedComparison,
        facts: Mapping[str, Any],
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        inputs: Inputs,
        objective: ObjectiveSpec | None,
    ) -> Stage:
        """Add the decay of one budget, after the segments of the trunk that the smaller budgets share."""
        first, stop = span
        more = [t - comparison.tokens for t in comparison.pruning.entry.tokens or self.study.retrain.tokens]
        ends = sorted(stop + difference for difference in more if difference <= 0)
        step = recipe.tokens_per_step
        forks = [first + math.floor((1 - recipe.decay_share) * (end - first) / step) * step for end in ends]
        warm = recipe.warmup * (ends[0] - first) / max(step, forks[0] - first)
        at, chain = first, dict(inputs)
        before: tuple[Stage, ...] = ()
        head, _, tail = name.partition("@")
        tail = tail.removeprefix(_short(comparison.tokens))  # the objective and the seed
        for number, fork in enumerate(dict.fromkeys(forks)):
            if fork == at:
                continue
            trunk = dataclasses.replace(recipe, schedule="constant", warmup=min(0.99, warm) if number == 0 else 0.0)
            trunk_name = f"{head}/trunk@{_short(fork - first)}{tail}"
            kind = init if at == first else "continued"
            trunk_facts = {"path": "trunk", "shape": shape, "config": facts["config"]}
            stage = self.train(trunk_name, shape, (at, fork), kind, trunk, trunk_facts, chain, objective)
            before = (*before, stage)
            chain, at = {**inputs, "model": stage}, fork
        decay = dataclasses.replace(recipe, schedule="linear", warmup=0.0)
        return self.train(
            name, shape, (at, stop), "continued" if at > first else init, decay, facts, chain, objective, before=before
        )

    def run_at_best(
        self,
        key: Hashable,
        rates: Sequence[float],
        name: str,
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        facts: Mapping[str, Any],
        inputs: Inputs = {},  # noqa: B006 - never changed
        objective: ObjectiveSpec | None = None,
    ) -> Stage:
        """Add a run at the best of several rates: the best of trials on all its tokens, or a run at their rate.

        Args:
            key: what the rate is for, whatever the seed. The first call for it, with the first seed, adds the trials.
            rates: to try; if there are none, the run has the recipe's rate.
        """
        arguments = (shape, span, init, recipe)
        if not rates:
            return self.train(name, *arguments, facts, inputs, objective)
        if key not in self.choices:
            self.choices[key] = self._choice(rates, name, *arguments, facts, inputs, objective)
            if "path" in self.choices[key].facts:  # the best trial is this run
                return self.choices[key]
        choice = self.choices[key]
        return self.train(name, *arguments, {**facts, "choice": choice}, {**inputs, "rate": choice}, objective)

    def _choice(
        self,
        rates: Sequence[float],
        name: str,
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        facts: Mapping[str, Any],
        inputs: Inputs,
        objective: ObjectiveSpec | None,
    ) -> Stage:
        """Add trials of a run and the choice among them.

        Trials on all tokens of the run have one that is the run, so that the choice has its facts. Shorter trials are
        the same for all larger budgets.
        """
        sweep, evaluation = self.study.sweep, self.study.evaluation
        assert sweep
        first, stop = span
        end = min(stop, first + sweep.tokens) if sweep.tokens else stop
        trial_facts = {"path": "trial", "shape": shape, "config": facts["config"]}
        trials = {
            str(rate): self.train(
                f"{name}/rate-{rate:g}",
                shape,
                (first, end),
                init,
                dataclasses.replace(recipe, peak_rate=rate),
                trial_facts,
                inputs,
                objective,
            )
            for rate in map(float, rates)
        }
        content = {
            "evaluation": {"skip": evaluation.windows, "windows": sweep.windows, "seqlen": self.sequence},
            "dtype": self.study.compute.dtype,
            "keep": "model" if end == stop else None,
        }
        choice_facts: dict[str, Any] = {"trials": trials, "sweep_seed": recipe.seed}
        if end == stop:
            cost = next(iter(trials.values())).facts["cost"]
            choice_facts |= {**facts, "shape": shape, "cost": cost, "before": (), "peak_rate": None}
        name = name if end == stop else f"{name}/rate"
        inputs, runtime = {"corpus": self.corpus, **trials}, {"device": self.study.compute.device}
        return self.add(Stage("select", name, content, inputs, 0, 0.0, runtime, choice_facts))

    def train(
        self,
        name: str,
        shape: Shape,
        span: tuple[int, int],
        init: str,
        recipe: Recipe,
        facts: Mapping[str, Any],
        inputs: Inputs = {},  # noqa: B006 - never changed
        objective: ObjectiveSpec | None = None,
        *,
        before: tuple[Stage, ...] = (),
    ) -> Stage:
        """Add a run over the tokens ``span``.

        Args:
            span: first token, and the token after the last.
            recipe: of the training; its rate applies unless ``inputs`` have a ``rate``.
            facts: of the stage; ``config`` has the keys of config.json that the study sets.
            objective: the loss; None for the language-model loss.
        """
        study = self.study
        settings, fresh = identity(recipe), init in _FRESH
        if init in (
            "pruned",
            "continued",
            "shuffled-weights",
            "parent-continued",
        ):  # no random weights, so their settings have no effect
            adapter = objective.adapter if objective else None  # whose first weights are drawn
            unused = ("init_std",) if init == "shuffled-weights" or adapter else ("init_std", "seed")
            settings = {key: value for key, value in settings.items() if key not in unused}
        if "rate" in inputs:
            settings["peak_rate"] = None
        points = study.evaluation.points if facts["path"] not in ("trunk", "recovery") else 1
        tokens = span[1] - span[0]
        distill = objective.distill if objective else None
        adapter, sparse = objective.adapter if objective else None, facts.get("granularity") == "sparse"
        flops = training_flops(adapter, shape, tokens, recipe, sparse=sparse)
        if distill and inputs["teacher"].kind != "teach":
            flops += teacher_flops(inputs["teacher"].facts["shape"], tokens, self.sequence)
        content = {
            "init": "scratch" if fresh else init,
            "shape": sizes_of(shape) if fresh else None,
            "slice": list(span),
            "recipe": settings,
            "dtype": study.compute.dtype,
            # ``skip`` has been zero since rates are chosen elsewhere; it keeps the identity of earlier runs
            "evaluation": {"skip": 0, "windows": study.evaluation.windows, "points": points},
            **({"config": identity(facts["config"])} if fresh and facts["config"] else {}),
            **({"objective": identity(distill)} if distill else {}),
            **({"adapter": identity(objective.adapter)} if objective and objective.adapter else {}),
            **({"keep": "state"} if facts["path"] == "trunk" else {}),
            **({"trial": True} if facts["path"] == "trial" else {}),
        }
        runtime = {**self.runtime(), "micro_batch": recipe.micro_batch}
        cost = (sum(s.tokens for s in before) + tokens, sum(s.flops for s in before) + flops)
        rate = None if "rate" in inputs else recipe.peak_rate
        facts = {**facts, "shape": shape, "cost": cost, "before": before, "peak_rate": rate}
        inputs = {"corpus": self.corpus, **inputs}
        return self.add(Stage("train", name, content, inputs, tokens, flops, runtime, facts))

    def teaching(self, parent: Stage, span: tuple[int, int], recipe: Recipe, objective: ObjectiveSpec) -> Stage:
        """Add the stage that saves a parent's log-probabilities of a slice; runs on the same slice share it.

        Raises:
            UserError: if ``top_k`` is more than the parent's vocabulary.
        """
        shape, spec = parent.facts["shape"], objective.distill
        assert spec and spec.top_k
        if spec.top_k > shape.vocabulary:
            raise UserError(
                f"retrain.objective.top_k: {spec.top_k} is more than the parent's vocabulary of {shape.vocabulary}"
            )
        tokens = span[1] - span[0]
        content = {
            "slice": list(span),
            "sequence": recipe.sequence,
            "attention": recipe.attention,
            "top_k": spec.top_k,
            "temperature": spec.temperature,
            "dtype": self.study.compute.dtype,
        }
        facts = {"path": "teach", "shape": shape, "parent": parent.facts["parent"]}
        facts["bytes"] = logits_size(tokens, recipe.sequence, spec.top_k, shape.vocabulary)
        flops, inputs = teacher_flops(shape, tokens, self.sequence), {"corpus": self.corpus, "model": parent}
        name = f"{parent.name}/teach@{_short(tokens)}"
        return self.add(Stage("teach", name, content, inputs, tokens, flops, self.runtime(), facts))

    def runtime(self) -> dict[str, Any]:
        compute = self.study.compute
        keys = ("device", "processes", "replicas", "recompute", "compile")
        return {key: getattr(compute, key) for key in keys}

    def evaluate(self, model: Stage, cost: bool = False) -> None:
        """Add the evaluation of a model, that with its weights as served, and, with ``cost``, its serving cost.

        What is served are retrained models and their twins, whose comparison may turn out otherwise.

        The cost is measured of one parent of a name and of one pruned model of a target. Those of other seeds, the
        retrained model and its twin have the same shape and number of zeros, and so the same cost.
        """
        evaluation, device = self.study.evaluation, self.study.compute.device
        name = f"{model.name}/pruned" if model.kind == "prune" else model.name
        content = {"windows": evaluation.windows, "seqlen": self.sequence}
        content |= {"suite": self.suite} if self.suite else {}
        content |= {"dtype": self.study.compute.dtype} if self.study.compute.dtype != "float32" else {}
        runtime = {"device": device, "text_data": evaluation.text_data, "tasks_data": evaluation.tasks_data}
        facts, inputs = {"of": model.fingerprint}, {"corpus": self.corpus, "model": model}
        self.add(Stage("evaluate", name, content, inputs, 0, 0.0, runtime, facts))
        loss_alone = {key: value for key, value in content.items() if key != "suite"}
        for weights in evaluation.weights if model.facts["path"] in ("P-R", "scratch") else ():
            served = {**loss_alone, "weights": weights, "form": str(WEIGHT_FORMATS[weights])}
            served_facts = {"served": model.fingerprint, "weights": weights}
            self.add(Stage("evaluate", f"{name}/{weights}", served, inputs, 0, 0.0, {"device": device}, served_facts))
        if cost and evaluation.measurements.cost:
            content = {"workload": identity(Workload())}
            self.add(Stage("cost", name, content, {"model": model}, 0, 0.0, {"device": device}, facts))

    def add(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        return stage


#: fields of a shape that a dense model with equal layers does not have
_MIXTURES_ALONE = ("kinds", "fixed", "experts", "expert_ffn", "active", "groups")


def sizes_of(shape: Shape) -> Any:
    """The sizes of a shape as plain values, without its family; what only mixtures have is left out of others."""
    dense = {f.name: f.default for f in dataclasses.fields(shape) if f.name in _MIXTURES_ALONE}
    sizes = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name != "family"}
    return identity({name: size for name, size in sizes.items() if name not in dense or size != dense[name]})


def _short(tokens: int) -> str:
    """Format tokens as ``400k``, ``1.5M`` or ``52.4288B``; in full if that would be inexact."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        text = f"{tokens / unit:.6g}"
        if tokens >= unit and round(float(text) * unit) == tokens:
            return f"{text}{suffix}"
    return str(tokens)
