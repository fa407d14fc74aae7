"""A study file as a whole: its sections, and what must hold among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from secateur.config import Fraction, Positive, listed, load_yaml, parse, spec
from secateur.data.corpus import CorpusSpec
from secateur.errors import UserError, did_you_mean, spell
from secateur.formatting import plural
from secateur.methods.registry import get_method
from secateur.study.question import QuestionSpec
from secateur.study.sections import (
    CalibrationSpec,
    ComputeSpec,
    Controls,
    DataSpec,
    EvaluationSpec,
    Exclude,
    Label,
    MethodEntry,
    ParentSpec,
    RetrainSpec,
    Seeds,
    SeedsSpec,
    Settings,
    SettingSpec,
    SweepSpec,
    TwinInit,
    check_unique,
)
from secateur.training.recipe import Recipe

__all__ = ["StudySpec", "load_study", "sets_sequence"]


@spec
class StudySpec:
    """A controlled comparison of pruning and training from scratch."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str = ""
    question: QuestionSpec | None = None
    corpus: CorpusSpec
    parent: ParentSpec | None = None
    parents: Mapping[Label, ParentSpec] | None = None  #: name -> parent, instead of ``parent``
    methods: Annotated[tuple[MethodEntry, ...], listed("method"), Field(min_length=1)]
    ratios: Annotated[tuple[Fraction, ...], listed()] = ()
    retrain: RetrainSpec
    settings: Settings = (SettingSpec(kind="equal_training_tokens"), SettingSpec(kind="equal_total_tokens"))
    controls: Controls = ()
    twin_init: TwinInit = "redrawn"
    data: DataSpec = DataSpec()
    seeds: Seeds = SeedsSpec()
    exclude: tuple[Exclude, ...] = ()
    sweep: SweepSpec | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    recipe: Recipe = Recipe()
    evaluation: EvaluationSpec = EvaluationSpec()
    compute: ComputeSpec = ComputeSpec()
    children: Positive | None = (
        None  #: models that share a parent's cost; default: the number of pruned models of the study
    )

    def __post_init__(self) -> None:
        if (self.parent is None) == (not self.parents):
            raise UserError("parent: this key is required" if self.parent is None else "parents: leave out parent")
        check_unique("ratios", self.ratios)
        check_unique("seeds", self.seeds.values)
        check_unique("settings", [setting.kind for setting in self.settings])
        check_unique("retrain.tokens", self.retrain.tokens)
        if self.retrain.trunk == "shared" and self.recipe.schedule != "wsd":
            raise UserError("retrain.trunk: a shared trunk needs recipe.schedule wsd; set it, or leave trunk out")
        if self.sweep and self.retrain.trunk == "shared":
            raise UserError("sweep: does not go with a shared trunk; leave out retrain.trunk")
        self._check_entries()
        self._check_adapters()
        for name in self.all_parents:
            self._check_calibration(name, self.calibration, "calibration")
        for number, entry in enumerate(self.methods):
            if entry.calibration:
                self._check_calibration(self.parent_of(entry), entry.calibration, f"methods[{number}].calibration")

    def _check_calibration(self, name: str, calibration: CalibrationSpec, where: str) -> None:
        """Refuse windows that a pretrained parent has no text or no positions for."""
        parent, seqlen = self.all_parents.get(name), calibration.seqlen or self.recipe.sequence
        if parent is None or parent.checkpoint is not None or parent.tokens is None:
            return
        if seqlen > self.recipe.sequence:
            raise UserError(f"{where}.seqlen: {seqlen} is more than recipe.sequence, {self.recipe.sequence}; lower it")
        if calibration.source is None and calibration.windows * seqlen > parent.tokens:
            raise UserError(
                f"{where}.windows: {plural(calibration.windows, 'window')} of {plural(seqlen, 'token')} "
                f"are more than {'parent' if self.parent else f'parents.{name}'}.tokens {parent.tokens}"
            )

    def _check_entries(self) -> None:
        targets: list[tuple[str, str]] = []
        for number, entry in enumerate(self.methods):
            where = f"methods[{number}]"
            try:
                get_method(entry.method, entry.options)
                targets += [(entry.label, target) for target in entry.targets(self.ratios)]
            except UserError as error:
                raise UserError(spell(str(error), f"{where}.{{}}".format)) from None
            self._check_iterations(entry, where)
            if entry.parent is not None and entry.parent not in self.all_parents:
                raise UserError(
                    f"{where}.parent: {entry.parent!r} is not a parent{did_you_mean(entry.parent, self.all_parents)}"
                )
            if not (entry.ratios or entry.shapes or entry.pattern or self.ratios):
                raise UserError(
                    "ratios: this key is required, unless every method has its own ratios, shapes or pattern"
                )
        for label, target in targets:
            if targets.count((label, target)) > 1:
                raise UserError(f"methods: an entry appears twice: {label} at {target}; give one of them another name")

    def _check_adapters(self) -> None:
        """Refuse adapters that cannot be told apart or that contradict the study."""
        for entry in self.methods:
            objectives = self.retrain.objectives(entry.objective)
            adapters = [objective.adapter for objective in objectives if objective.adapter]
            labels = [objective.label for objective in objectives if objective.adapter]
            for label in labels:
                if labels.count(label) > 1:
                    raise UserError(
                        f"retrain.adapter: two adapters are called {label}; list them in retrain.objective, each with "
                        "a name"
                    )
            if adapters and self.retrain.trunk == "shared":
                raise UserError("retrain.trunk: a shared trunk needs full training; leave it out, or the adapters")
            if self.sweep and any(adapter.peak_rate for adapter in adapters):
                raise UserError("retrain.adapter.peak_rate: the sweep chooses the rate; leave one of the two out")

    def _check_iterations(self, entry: MethodEntry, where: str) -> None:
        """Refuse steps of pruning beside what divides or repeats the retraining in another way."""
        if entry.iterations == 1 and entry.iteration_schedule != "linear":
            raise UserError(f"{where}.iteration_schedule: goes with iterations of 2 or more; leave it out")
        if entry.iterations > 1 and self.retrain.trunk == "shared":
            raise UserError(f"{where}.iterations: does not go with a shared trunk; leave out retrain.trunk")
        if entry.iterations > 1 and entry.reconstruct:
            raise UserError(
                f"{where}.iterations: does not go with reconstruct, whose tokens have one place; leave one out"
            )
        objectives = self.retrain.objective if entry.objective is None else entry.objective
        if entry.iterations > 1 and any(objective.kind == "reconstruct" for objective in objectives):
            raise UserError(
                f"{where}.iterations: recoveries train, and the objective reconstruct does not; leave one out"
            )
        if entry.iterations > 1 and self.sweep:
            raise UserError(f"{where}.iterations: its recoveries have no rates to sweep; leave out iterations or sweep")

    @property
    def all_parents(self) -> Mapping[str, ParentSpec]:
        """Name -> parent; the study's own comes first."""
        return self.parents or {"parent": self.parent}  # type: ignore[dict-item]

    def seeds_of(self, entry: MethodEntry) -> tuple[int, ...]:
        """The seeds of an entry's runs: its own, the study's, or the recipe's."""
        seeds = self.seeds.values if entry.seeds is None else entry.seeds
        return seeds or (self.recipe.seed,)

    @property
    def parents_vary(self) -> bool:
        """Whether each seed has its own parent and pruning. A study with one seed has nothing to vary."""
        return self.seeds.vary == "all" and len({seed for entry in self.methods for seed in self.seeds_of(entry)}) > 1

    @property
    def text(self) -> CorpusSpec:
        """The corpus. If every parent is a checkpoint, the first one's tokenizer is the default."""
        names = [parent.checkpoint for parent in self.all_parents.values()]
        if self.corpus.tokenizer is not None or None in names:
            return self.corpus
        return replace(self.corpus, tokenizer=names[0])

    def twin_init_of(self, entry: MethodEntry) -> TwinInit:
        """The first weights of an entry's twins, if its method is sparse."""
        return entry.twin_init or self.twin_init

    def calibration_of(self, entry: MethodEntry) -> CalibrationSpec:
        """What an entry is scored on: its own calibration, or the study's."""
        return entry.calibration or self.calibration

    def parent_of(self, entry: MethodEntry) -> str:
        """The name of the parent that an entry prunes."""
        return entry.parent or next(iter(self.all_parents))


def load_study(path: Path) -> StudySpec:
    """Read a study file.

    Raises:
        UserError: if it is missing or invalid.
    """
    try:
        return parse(StudySpec, load_yaml(path), origin=str(path))
    except UserError as error:
        text = spell(str(error), str)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def sets_sequence(path: Path) -> bool:
    """Whether a valid study file sets ``recipe.sequence``, so that it is not the default."""
    return "sequence" in (load_yaml(path).get("recipe") or {})
