"""The plan of a study: its stages, their tokens and FLOPs, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.comparison.regime import PUBLISHED, RateSweeps, TokenShare
from secateur.formatting import byte_size, count, duration, join_words, plural, scientific
from secateur.report.regime_prose import REGIME_TITLE, share_json, sweeps_sentence, tokens_sentence
from secateur.runtime import has_accelerator
from secateur.study.pace import Pace
from secateur.study.planner import tokens_needed, trunk_savings
from secateur.study.stage import Stage, unique
from secateur.study.sweeps import choice_of, is_run
from secateur.training.recipe import FEW_STEPS, few_steps

__all__ = [
    "CORE_FLOPS",
    "FLOPS_PER_SECOND",
    "PlannedStage",
    "PlannedTrials",
    "StudyPlan",
    "plan_study",
    "shared_controls",
    "step_warnings",
]

FLOPS_PER_SECOND = 4e14  #: of the reference device: an H100 at about 40% of its bfloat16 peak
CORE_FLOPS = 1e10  #: FLOPs a second of one core of a CPU in training, roughly
_MOST_CPU_HOURS = 1000  # from which on a time on one core says nothing

#: kinds of stages that the text counts and does not list
_COUNTED = {
    "evaluate": ("evaluation", "evaluations"),
    "cost": ("measurement of what a model costs to run", "measurements of what a model costs to run"),
    "select": ("choice of a rate", "choices of a rate"),
}
#: path of a stage -> the purpose of its FLOPs
_PURPOSES = {
    "parent": "parents",
    "pruned": "pruning",
    "pruning-step": "pruning",
    "P-R": "retraining",
    "teach": "saved teachers",
    "recovery": "retraining",
    "scratch": "from scratch",
    "control": "controls",
    "trunk": "trunks",
    "trial": "rate sweeps",
}
_FORMULA = (
    "FLOPs of a token forwards: 2 for each weight of the blocks' linears and of the head, and 4 x heads x head_dim for "
    "each layer and attended position, of which there are (sequence + 1) / 2 on average. Training: three times that. A "
    "teacher, scoring, and the reconstruction of blocks: by the passes they take. Zeros of sparse weights count in "
    "full, and of routed experts those that a token is routed to."
)


@dataclass(frozen=True)
class PlannedStage:
    """A stage with the tokens that it trains or scores on, and its FLOPs."""

    kind: str
    name: str
    tokens: int
    flops: float
    fingerprint: str


@dataclass(frozen=True)
class PlannedTrials:
    """The trials of learning rates."""

    number: int
    runs: int  #: choices whose best trial is a run of the study, and is not trained twice
    choices: int
    seeds: tuple[int, ...]  #: of the trials

    def __str__(self) -> str:
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {join_words([str(seed) for seed in self.seeds])}"
        text = f"Learning rates are swept with {seeds} alone, which serves all seeds: {plural(self.number, 'trial')}"
        text += f" for {plural(self.choices, 'choice of a rate', 'choices of a rate')}."
        if self.runs:
            text += (
                f" The best trial of {self.runs} of them is the run itself, which counts as such and not as a sweep."
            )
        return text


@dataclass(frozen=True)
class StudyPlan:
    """What a study will run and what it will cost; ``str()`` gives the text of ``secateur study plan``.

    Attributes:
        training_tokens_without_trunks: training tokens if no run shared a trunk.
        corpus_tokens: training tokens that the corpus must have.
        flops_by: purpose, such as ``retraining``, -> FLOPs.
        flops_per_second: speed of the device that ``device_hours`` counts.
        parents: name -> tokens for each parameter of a parent.
        sweeps: which learning rates are chosen by a sweep.
        trials: of learning rates; None without any.
        pace: the speed of the study's finished training stages; None if there are none.
        notes: what seeds vary, which pruning trains on tokens of its own, and which runs have few steps.
    """

    study: str
    stages: tuple[PlannedStage, ...]
    training_tokens: int
    training_tokens_without_trunks: int
    corpus_tokens: int
    flops: float
    flops_by: Mapping[str, float]
    flops_per_second: float
    parents: Mapping[str, TokenShare]
    sweeps: RateSweeps
    trials: PlannedTrials | None = None
    notes: tuple[str, ...] = ()
    pace: Pace | None = None

    @property
    def device_hours(self) -> float:
        """Hours of one device at ``flops_per_second``."""
        return self.flops / self.flops_per_second / 3600

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, as ``--json`` prints it."""
        content = asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}
        speed = content.pop("flops_per_second")
        del content["pace"]
        content |= {
            "parents": {name: share_json(share) for name, share in self.parents.items()},
            "published": share_json(PUBLISHED),
        }
        pace = self.pace
        measured = {"flops_per_second": pace.speed, "stages": pace.stages, "device": pace.device} if pace else None
        hours = {"flops_per_second": speed, "hours": self.device_hours, "measured": measured}
        return content | {"device_hours": hours, "formula": _FORMULA}

    def _times(self) -> list[str]:
        """What the FLOPs take: on the reference device, and as measured or, without a GPU, on a core of a CPU."""
        reference = " (an H100 at about 40% of its peak)" if self.flops_per_second == FLOPS_PER_SECOND else ""
        speed = f"{scientific(self.flops_per_second)} FLOPs a second{reference}"
        lines = [f"About {duration(3600 * self.device_hours)} of one device at {speed}."]
        if self.pace and self.pace.speed:
            time = duration(self.flops / self.pace.speed)
            lines.append(f"On the {self.pace.device_name}: about {time} for one process, at {self.pace}.")
        elif not has_accelerator() and self.flops < 3600 * _MOST_CPU_HOURS * CORE_FLOPS:
            time = duration(self.flops / CORE_FLOPS)
            lines.append(
                f"This machine has no GPU. On one core of a CPU: roughly {time}, at an assumed "
                f"{scientific(CORE_FLOPS)} FLOPs a second; the first training stage measures it."
            )
        return lines

    def __str__(self) -> str:
        purposes = ", ".join(f"{name} {scientific(flops)}" for name, flops in self.flops_by.items())
        lines = [
            f"{self.study}: {plural(len(self.stages), 'stage')}",
            "",
            *self._table(),
            "",
            f"{plural(self.training_tokens, 'training token')}, {scientific(self.flops)} FLOPs in all: {purposes}.",
            *self._times(),
            f"The corpus must have {plural(self.corpus_tokens, 'training token')}.",
        ]
        trained, alone = self.training_tokens, self.training_tokens_without_trunks
        if trained < alone:
            lines.append(
                f"Ladders share their trunks: {plural(trained, 'token')} instead of {alone:,}, "
                f"{1 - trained / alone:.0%} less."
            )
        lines += [str(self.trials)] if self.trials else []
        return "\n".join([*lines, *self.notes, _FORMULA, "", *self._regime(), "", "Nothing has been run."])

    def _regime(self) -> list[str]:
        names = {name: f"parent {name}" if len(self.parents) > 1 else "the parent" for name in self.parents}
        sentences = [tokens_sentence(names[name], share) for name, share in self.parents.items()]
        return [REGIME_TITLE, *sentences, sweeps_sentence(self.sweeps)]

    def _table(self) -> list[str]:
        listed = [stage for stage in self.stages if stage.kind not in _COUNTED]
        width = max(len(stage.name) for stage in listed)
        kinds = max(6, *(len(stage.kind) for stage in listed))
        lines = [f"{'kind':{kinds}}  {'stage':{width}}  {'tokens':>10}  {'FLOPs':>10}"]
        for stage in listed:
            tokens, flops = (count(stage.tokens), f"{stage.flops:.2e}") if stage.tokens else ("-", "-")
            lines.append(f"{stage.kind:{kinds}}  {stage.name:{width}}  {tokens:>10}  {flops:>10}")
        counts = {words: sum(stage.kind == kind for stage in self.stages) for kind, words in _COUNTED.items()}
        return [*lines, "and " + ", ".join(plural(number, *words) for words, number in counts.items() if number)]


def plan_study(
    name: str,
    stages: Sequence[Stage],
    flops_per_second: float = FLOPS_PER_SECOND,
    pace: Pace | None = None,
    notes: Sequence[str] = (),
) -> StudyPlan:
    """Sum up the tokens and FLOPs of a study's stages; ``notes`` come before those on the stages."""
    shared = shared_controls(stages)
    stages = unique(stages)
    trained, alone = trunk_savings(stages)
    return StudyPlan(
        study=name,
        stages=tuple(PlannedStage(s.kind, s.name, s.tokens, s.flops, s.fingerprint) for s in stages),
        training_tokens=trained,
        training_tokens_without_trunks=alone,
        corpus_tokens=tokens_needed(stages),
        flops=sum(stage.flops for stage in stages),
        flops_by=_flops_by_purpose(stages),
        flops_per_second=flops_per_second,
        pace=pace,
        parents={s.facts["parent"]: _share(s) for s in stages if s.facts.get("path") == "parent"},
        sweeps=RateSweeps(*(_swept(stages, path) for path in ("parent", "scratch", "P-R"))),
        trials=_trials(stages),
        notes=(
            *notes,
            *_seed_notes(stages),
            *_learning_notes(stages),
            *_teaching_notes(stages),
            *_iteration_notes(stages),
            *_control_notes(stages),
            *shared,
            *step_warnings(stages),
        ),
    )


def step_warnings(stages: Sequence[Stage]) -> list[str]:
    """Warn of runs with few optimizer steps: one sentence for each purpose of runs.

    A run on a shared trunk has the trunk's steps as well.
    """
    runs: dict[str, dict[str, tuple[int, int, int]]] = {}
    for stage in unique(stages):
        if stage.kind != "train" or stage.facts["path"] == "trunk":
            continue
        recipe = stage.identity["recipe"]
        few = few_steps(stage.facts["cost"][0], recipe["tokens_per_step"], recipe["sequence"])
        if few:
            runs.setdefault(_PURPOSES[stage.facts["path"]], {})[stage.name] = few
    return [_step_warning(purpose, few) for purpose, few in runs.items()]


def _step_warning(purpose: str, runs: Mapping[str, tuple[int, int, int]]) -> str:
    name, (least, size, more) = min(runs.items(), key=lambda run: run[1][0])
    most = max(steps for steps, _, _ in runs.values())
    number = plural(len(runs), "run")
    steps = f"{least} to {most}" if most > least else f"{least}"
    advice = f"recipe.tokens_per_step: {size} would give {name} {more}"
    return (
        f"Few steps ({purpose}): {number} of {steps} optimizer steps, fewer than {FEW_STEPS}; "
        + (advice if more > least else "a shorter recipe.sequence would give more")
        + "."
    )


def _share(parent: Stage) -> TokenShare:
    shape = parent.facts["shape"]
    return TokenShare(parent.facts["tokens"], shape.total, shape.non_embedding)


def _swept(stages: Sequence[Stage], path: str) -> bool | None:
    """Whether all runs of a path have their learning rate from a sweep; None without such runs."""
    runs = [stage for stage in stages if stage.kind in ("train", "select") and stage.facts.get("path") == path]
    return all(map(choice_of, runs)) if runs else None


def _flops_by_purpose(stages: Sequence[Stage]) -> dict[str, float]:
    """Purpose -> FLOPs, as in :class:`StudyPlan`. A trial that is a run counts as the run."""
    flops_by: dict[str, float] = {}
    for stage in stages:
        if stage.flops:
            purpose = _PURPOSES[stage.facts["path"]]
            flops_by[purpose] = flops_by.get(purpose, 0.0) + stage.flops
    for stage in stages:
        if stage.kind == "select" and is_run(stage):
            purpose, flops = _PURPOSES[stage.facts["path"]], stage.facts["cost"][1]
            flops_by[purpose] = flops_by.get(purpose, 0.0) + flops
            flops_by[_PURPOSES["trial"]] -= flops
    return flops_by


def _trials(stages: Sequence[Stage]) -> PlannedTrials | None:
    choices = [stage for stage in stages if stage.kind == "select"]
    if not choices:
        return None
    trials = {trial.fingerprint for choice in choices for trial in choice.facts["trials"].values()}
    seeds = sorted({choice.facts["sweep_seed"] for choice in choices})
    return PlannedTrials(len(trials), sum(map(is_run, choices)), len(choices), tuple(seeds))


def _seed_notes(stages: Sequence[Stage]) -> list[str]:
    """What the seeds of a study vary, in one sentence; empty for a study with one seed."""
    seeds = sorted({stage.facts["seed"] for stage in stages if "retrain_tokens" in stage.facts})
    if len(seeds) < 2:
        return []
    parents = {stage.facts["seed"] for stage in stages if stage.facts.get("path") == "parent"}
    prunings = {stage.facts["seed"] for stage in stages if stage.kind == "prune"}
    parts = ["the order of the data", "fresh weights"]
    parts += ["the parent"] if parents - {None} else []
    parts += ["its pruning"] if prunings - {None} else []
    shared = [name for name, varied in (("parent", parents), ("pruning", prunings)) if varied == {None}]
    rest = f"; all seeds share one {' and one '.join(shared)}" if shared else ""
    return [f"Seeds {join_words([str(seed) for seed in seeds])} vary {join_words(parts)}{rest}."]


def _control_notes(stages: Sequence[Stage]) -> list[str]:
    """The control that a study of checkpoints lacks, in one sentence; empty if it has it or pretrains its parents."""
    checkpoints = [stage.facts["parent"] for stage in stages if stage.kind == "fetch"]
    matched = {stage.facts["parent"] for stage in stages if stage.facts.get("init") == "parent-continued"}
    missing = [name for name in checkpoints if name not in matched]
    if not missing:
        return []
    subject = "The parent is a checkpoint" if missing == ["parent"] else f"{join_words(missing)}: checkpoints"
    return [
        f"{subject}, which the study does not pretrain: the control parent-continued, not in this study, trains the "
        "parent on the R tokens too, and tells what pruning costs from what the corpus gives."
    ]


def shared_controls(stages: Sequence[Stage]) -> list[str]:
    """The cells whose two dense controls are one model, in one sentence; empty if there are none.

    Args:
        stages: of all cells, each of which lists a stage that it shares.
    """
    inits: dict[tuple[str, str], set[str]] = {}
    for stage in stages:
        if stage.facts.get("init") in ("dense-active", "dense-total"):
            cell = f"{stage.facts['method']} at {stage.facts['target']}"
            inits.setdefault((cell, stage.fingerprint), set()).add(stage.facts["init"])
    cells = list(dict.fromkeys(cell for (cell, _), kinds in inits.items() if len(kinds) > 1))
    if not cells:
        return []
    return [
        f"{join_words(cells)}: every expert that stays is active for every token, so dense-active and dense-total are "
        "the same model; it is trained once."
    ]


def _learning_notes(stages: Sequence[Stage]) -> list[str]:
    """The tokens that pruning itself trains on, one sentence for each method that does."""
    tokens = {s.facts["method"]: s.facts["training_tokens"] for s in stages if s.kind == "prune"}
    return [
        f"{name} trains on L = {plural(learned, 'token')} while it prunes; its twins train on as many more."
        for name, learned in tokens.items()
        if learned
    ]


def _teaching_notes(stages: Sequence[Stage]) -> list[str]:
    """The disk space of saved teachers, in one sentence; empty without one."""
    sizes = [stage.facts["bytes"] for stage in stages if stage.kind == "teach"]
    if not sizes:
        return []
    slices = plural(len(sizes), "slice")
    return [f"Saved teachers: log-probabilities of {slices} take {byte_size(sum(sizes))} of disk; runs share them."]


def _iteration_notes(stages: Sequence[Stage]) -> list[str]:
    """The steps of prunings that have several, one sentence for each entry and target."""
    notes: dict[str, None] = {}
    for run in stages:
        if run.facts.get("path") == "P-R" and (before := run.facts["pruning"].facts["before"]):
            tokens = [stage.tokens for stage in (*run.facts["before"], run)]
            parts = f"{tokens[0]:,}" + (f", in the end {tokens[-1]:,}" if tokens[-1] != tokens[0] else "")
            name = f"{run.facts['method']} at {run.facts['target']}"
            notes[f"{name} prunes in {len(before) + 1} steps, each followed by a recovery on {parts} tokens."] = None
    return list(notes)
