"""What a study file may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from secateur.config import RUNTIME, Count, Fraction, Positive, listed, load_yaml, parse, spec
from secateur.data.corpus import CorpusSpec
from secateur.errors import UserError, did_you_mean, spell
from secateur.evaluation.suite import Suite
from secateur.methods.registry import get_method, known_methods
from secateur.model.shapes import Shape
from secateur.pruning.target import Target
from secateur.training.recipe import Distill, Recipe

__all__ = [
    "CalibrationSpec",
    "ComputeSpec",
    "ControlSpec",
    "EvaluationSpec",
    "MethodEntry",
    "ObjectiveSpec",
    "ParentSpec",
    "RetrainSpec",
    "SettingSpec",
    "StudySpec",
    "SweepSpec",
    "load_study",
    "spell_keys",
]

SettingKind = Literal["equal_training_tokens", "equal_total_tokens", "equal_training_flops", "equal_total_flops"]
ControlKind = Literal["scratch", "redrawn", "permuted", "random-mask", "shuffled-weights", "dense-twin"]

Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]


def _known_method(name: str) -> str:
    if name not in known_methods():
        raise ValueError(f"{name!r} is not a known method{did_you_mean(name, known_methods())}")
    return name


Budgets = Annotated[tuple[Count, ...], listed(), Field(min_length=1)]


@spec
class ParentSpec:
    """A model that is pruned: a Llama of this shape that the study pretrains, or a checkpoint that is there already.

    For a checkpoint in a directory all sizes may be left out, and are then read from its configuration; those of a
    model of the Hub are wanted, to plan without a network. A checkpoint's ``tokens`` count in the ledger alone.
    """

    tokens: Count | None = None  #: P
    checkpoint: str | None = None  #: a directory, or hf:NAME[@REVISION]
    hidden: Positive | None = None
    ffn: Positive | None = None
    layers: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    head_dim: Positive | None = None  #: hidden / heads unless given
    vocabulary: Positive | None = None  #: of a checkpoint; otherwise it is that of the corpus
    tied: bool = False

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("hidden", "ffn", "layers", "heads", "kv_heads")}
        missing = [name for name, size in sizes.items() if size is None]
        if self.checkpoint is None:
            for key in (*missing, *(["tokens"] if self.tokens is None else [])):
                raise UserError(f"parent.{key}: this key is required, unless parent.checkpoint names a model")
            if self.vocabulary is not None:
                raise UserError("parent.vocabulary: is that of the corpus; set corpus.vocabulary")
        elif missing and len(missing) < len(sizes):
            raise UserError(f"parent.{missing[0]}: give all sizes of the checkpoint, or none")
        if not missing:
            assert self.hidden and self.heads and self.kv_heads
            if self.hidden % self.heads and self.head_dim is None:
                raise UserError(f"parent.hidden: {self.hidden} is no multiple of parent.heads {self.heads}")
            if self.heads % self.kv_heads:
                raise UserError(f"parent.heads: {self.heads} is no multiple of parent.kv_heads {self.kv_heads}")

    def shape(self, vocabulary: int) -> Shape | None:
        """The model's sizes; None where they are in its configuration alone."""
        if self.hidden is None:
            return None
        assert self.ffn and self.layers and self.heads and self.kv_heads
        head_dim = self.head_dim or self.hidden // self.heads
        vocabulary = self.vocabulary or vocabulary
        return Shape(self.hidden, self.ffn, self.layers, self.heads, self.kv_heads, head_dim, vocabulary, self.tied)


@spec
class ObjectiveSpec(Distill):
    """What a pruned model's retraining minimises: the language-model loss, or the divergence from its parent."""

    kind: Literal["language-model", "distill"]  # type: ignore[assignment]
    name: Label | None = None  #: in records and reports; the kind unless given
    teacher: Literal["parent"] = "parent"
    equal: Literal["tokens", "flops"] = "tokens"  #: to the language-model run on the same budget
    settings: Annotated[tuple[SettingKind, ...] | None, listed()] = None  #: instead of the study's

    @property
    def label(self) -> str:
        """Empty for the language-model loss."""
        return self.name or ("" if self.kind == "language-model" else self.kind)

    @property
    def distill(self) -> Distill | None:
        """How to teach; None where nobody does."""
        if self.kind == "language-model":
            return None
        return Distill(temperature=self.temperature, alpha=self.alpha, top_k=self.top_k)


@spec
class RetrainSpec:
    """The training of pruned models. Their from-scratch twins see the same tokens under the study's recipe."""

    tokens: Budgets  #: R; several make a ladder, each with a schedule of its own
    peak_rate: Rate | None = None  #: of the pruned runs; the recipe's unless given
    objective: Annotated[tuple[ObjectiveSpec, ...], listed("kind"), Field(min_length=1)] = (
        ObjectiveSpec(kind="language-model"),
    )
    trunk: Literal["own", "shared"] = (
        "own"  #: shared: the budgets of a ladder have one trunk, and only decays of their own
    )


@spec
class SettingSpec:
    """What a from-scratch twin has in common with the pruned run."""

    kind: SettingKind
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: the budgets R it is for; all unless given


@spec
class ControlSpec:
    """A run at equal training tokens that shares some of what a pruned model inherits."""

    init: ControlKind
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: as in a setting


Settings = Annotated[tuple[SettingSpec, ...], listed("kind")]
Controls = Annotated[tuple[ControlSpec, ...], listed("init")]


@spec
class MethodEntry:
    """A method with how much it shall remove; what is not said is the study's own."""

    method: Annotated[str, AfterValidator(_known_method)]
    name: Label | None = None  #: in records and reports; the method's unless given
    parent: str | None = None  #: which, of several; the first unless given
    ratios: Annotated[tuple[Fraction, ...] | None, listed()] = None
    shapes: Mapping[Label, str] | None = None  #: name -> sizes, as in hidden=3072,ffn=9216
    pattern: str | None = None  #: N:M
    of: Literal["total", "non-embedding"] | None = None
    axes: str | None = None
    allocation: Literal["uniform", "global"] = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: retrain.tokens
    settings: Settings | None = None
    seeds: Annotated[tuple[Seed, ...] | None, listed()] = None
    controls: Controls | None = None
    objective: Annotated[tuple[ObjectiveSpec, ...] | None, listed("kind")] = None  #: retrain.objective

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name or self.method

    def targets(self, ratios: tuple[float, ...]) -> dict[str, Target]:
        """What it is asked for, by name.

        Args:
            ratios: the study's.

        Raises:
            UserError: if it is asked for in two ways, or one cannot be read.
        """
        given = [key for key in ("ratios", "shapes", "pattern") if getattr(self, key)]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]}: say how much to remove in one way; make two entries of them")
        common = {"of": self.of, "axes": self.axes, "allocation": self.allocation}
        if self.pattern:
            return {self.pattern: Target.parse(pattern=self.pattern, **common)}
        if self.shapes:
            return {name: Target.parse(shape=text, **common) for name, text in self.shapes.items()}
        return {f"{ratio:g}": Target.parse(ratio=ratio, **common) for ratio in self.ratios or ratios}


@spec
class CalibrationSpec:
    """What pruning scores are computed on: windows of the parent's own training slice."""

    windows: Positive = 128
    seed: int = 42  #: which windows


@spec
class EvaluationSpec:
    """What is measured of every model: its held-out loss, and what a suite names besides."""

    windows: Positive = 256  #: spread over the held-out split
    points: Positive = 8  #: measurements along each training run
    suite: Annotated[tuple[str, ...], listed()] = ()  #: as ``secateur eval --suite`` takes them
    protocol: str = "heldout"  #: of the suite's perplexities
    text_data: Annotated[str | None, RUNTIME] = None  #: a folder with their texts; the Hub unless given
    tasks_data: Annotated[str | None, RUNTIME] = None  #: a folder with the documents of tasks; the Hub unless given
    task_limit: Positive | None = None  #: documents of each task; all unless given
    few_shot: Annotated[int, Field(ge=0)] | None = (
        None  #: examples in each prompt of a task; as many as the task says unless given
    )

    def __post_init__(self) -> None:
        asked = self.asked
        of_tasks = [(key, asked.tasks) for key in ("tasks_data", "task_limit", "few_shot")]
        for key, needed in (("text_data", asked.texts), *of_tasks):
            if getattr(self, key) is not None and not needed:
                raise UserError(f"evaluation.{key}: nothing of evaluation.suite reads it")

    @property
    def asked(self) -> Suite:
        """What the suite comes to."""
        if not self.suite:
            return Suite(loss=True)
        return Suite.parse(",".join(self.suite), self.protocol, where="evaluation.")


@spec
class SweepSpec:
    """Learning rates that are tried, on tokens of the run's own slice, for each architecture and path."""

    rates: Annotated[tuple[Rate, ...], Field(min_length=2)]
    tokens: Count | None = None  #: of each trial; the smallest budget unless given
    windows: Positive = 64  #: held-out windows that choose, others than those of ``evaluation``


@spec
class ComputeSpec:
    """How stages compute."""

    dtype: Literal["float32", "bfloat16"] = "float32"  #: of the forward pass in training; weights and sums are float32
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = "auto"
    processes: Annotated[Positive, RUNTIME] = 1  #: that share a stage of training or pruning
    replicas: Annotated[Positive, RUNTIME] = 1  #: groups of them that hold the model once each
    recompute: Annotated[bool, RUNTIME] = False
    compile: Annotated[bool, RUNTIME] = False


@spec
class Exclude:
    """Cells that are left out: those that have, of all that is named, one of the values."""

    method: Annotated[tuple[str, ...] | None, listed()] = None  #: an entry's name
    target: Annotated[tuple[str | float, ...] | None, listed()] = None
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: R
    seed: Annotated[tuple[Seed, ...] | None, listed()] = None
    objective: Annotated[tuple[str, ...] | None, listed()] = None
    setting: Annotated[tuple[SettingKind, ...] | None, listed()] = None
    control: Annotated[tuple[ControlKind, ...] | None, listed()] = None

    def __post_init__(self) -> None:
        if not any(getattr(self, f.name) for f in fields(self)):
            raise UserError("exclude: an entry has to name something, such as {seed: 1, setting: equal_total_tokens}")

    def covers(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell has, of all that is named, one of the values."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        named |= {"target": [v if isinstance(v, str) else f"{v:g}" for v in self.target]} if self.target else {}
        return all(cell.get(key) in values for key, values in named.items())


@spec
class StudySpec:
    """A controlled comparison of pruning and training from scratch."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str = ""
    corpus: CorpusSpec
    parent: ParentSpec | None = None
    parents: Mapping[Label, ParentSpec] | None = None  #: instead of ``parent``, by name
    methods: Annotated[tuple[MethodEntry, ...], listed("method"), Field(min_length=1)]
    ratios: Annotated[tuple[Fraction, ...], listed()] = ()
    retrain: RetrainSpec
    settings: Settings = (SettingSpec(kind="equal_training_tokens"), SettingSpec(kind="equal_total_tokens"))
    controls: Controls = ()
    seeds: Annotated[tuple[Seed, ...], listed()] = ()  #: those of the recipe unless given
    exclude: tuple[Exclude, ...] = ()
    sweep: SweepSpec | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    recipe: Recipe = Recipe()
    evaluation: EvaluationSpec = EvaluationSpec()
    compute: ComputeSpec = ComputeSpec()
    children: Positive | None = None  #: that share a parent's cost; the study's own pruned models unless given

    def __post_init__(self) -> None:
        if (self.parent is None) == (not self.parents):
            raise UserError("parent: this key is required" if self.parent is None else "parents: leave out parent")
        for key in ("ratios", "seeds"):
            _once(key, getattr(self, key))
        _once("settings", [setting.kind for setting in self.settings])
        _once("retrain.tokens", self.retrain.tokens)
        if self.retrain.trunk == "shared" and self.recipe.schedule != "wsd":
            raise UserError(
                "retrain.trunk: only runs with recipe.schedule wsd have a trunk; set it, or leave trunk out"
            )
        if self.sweep and self.retrain.trunk == "shared":
            raise UserError("sweep: is for runs with schedules of their own; leave out retrain.trunk")
        self._check_entries()
        for name, parent in self.all_parents.items():
            asked = self.calibration.windows * self.recipe.sequence
            if parent.checkpoint is None and parent.tokens and asked > parent.tokens:
                raise UserError(
                    f"calibration.windows: {self.calibration.windows} windows of {self.recipe.sequence} tokens "
                    f"are more than {'parent' if self.parent else f'parents.{name}'}.tokens {parent.tokens}"
                )

    def _check_entries(self) -> None:
        for number, entry in enumerate(self.methods):
            where = f"methods[{number}]"
            try:
                get_method(entry.method, entry.options)
            except UserError as error:
                raise UserError(spell(str(error), f"{where}.{{}}".format)) from None
            if entry.parent is not None and entry.parent not in self.all_parents:
                raise UserError(
                    f"{where}.parent: {entry.parent!r} is no parent{did_you_mean(entry.parent, self.all_parents)}"
                )
            if not (entry.ratios or entry.shapes or entry.pattern or self.ratios):
                raise UserError("ratios: this key is required, unless every method says itself how much to remove")
        named = [(entry.label, target) for entry in self.methods for target in entry.targets(self.ratios)]
        for label, target in named:
            if named.count((label, target)) > 1:
                raise UserError(f"methods: an entry appears twice: {label} at {target}; give one of them another name")

    @property
    def all_parents(self) -> Mapping[str, ParentSpec]:
        """Every parent by its name, the study's own first."""
        return self.parents or {"parent": self.parent}  # type: ignore[dict-item]

    @property
    def text(self) -> CorpusSpec:
        """The corpus; where every parent is a checkpoint, under the tokenizer of the first unless it names one."""
        names = [parent.checkpoint for parent in self.all_parents.values()]
        if self.corpus.tokenizer is not None or None in names:
            return self.corpus
        return replace(self.corpus, tokenizer=names[0])

    def parent_of(self, entry: MethodEntry) -> str:
        """The name of the parent that an entry prunes."""
        return entry.parent or next(iter(self.all_parents))


def _once(key: str, values: Any) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise UserError(f"{key}: an entry appears twice: {value}")


def load_study(path: Path) -> StudySpec:
    """Read a study file.

    Raises:
        UserError: if it is missing or says something that cannot be.
    """
    try:
        return parse(StudySpec, load_yaml(path), origin=str(path))
    except UserError as error:
        text = spell_keys(str(error))
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def spell_keys(message: str) -> str:
    """Spell the fields that an error names in backticks as keys of a study file."""
    message = re.sub(r"(?<![\w-])--(?=[a-z])", "", message)
    return spell(message, str)
