"""The sections of a study file, each with its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from secateur.config import RUNTIME, Count, Fraction, IdentityKey, Positive, listed, spec
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow
from secateur.errors import UserError, did_you_mean
from secateur.evaluation.suite import Suite
from secateur.methods.registry import known_methods
from secateur.model.families.experts import MIXTRAL
from secateur.model.quantisation import WeightKind
from secateur.model.shapes import Shape
from secateur.pruning.iterations import IterationSchedule
from secateur.pruning.reconstruction import RATE
from secateur.pruning.target import Allocation, Target
from secateur.study.settings import SettingKind
from secateur.training.adapter import Adapter
from secateur.training.recipe import Distill

__all__ = [
    "CalibrationSpec",
    "ComputeSpec",
    "ControlSpec",
    "DataSpec",
    "EvaluationSpec",
    "MethodEntry",
    "ObjectiveSpec",
    "ParentSpec",
    "RetrainSpec",
    "SeedsSpec",
    "SettingSpec",
    "SweepSpec",
    "check_unique",
]

ControlKind = Literal[
    "scratch",
    "redrawn",
    "redrawn-linears",
    "permuted",
    "random-mask",
    "shuffled-weights",
    "dense-twin",
    "dense-active",
    "dense-total",
    "without-pruning-tokens",
    "parent-continued",
]
#: The first weights of a sparse model's twin, under the parent's mask: all of them new, or those of linears alone.
TwinInit = Literal["redrawn", "redrawn-linears"]

SAVED_TOP_K = 64  #: default of ``top_k`` where the teacher is saved

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
    """A model to prune: a Llama of this shape that the study pretrains, or an existing checkpoint.

    The sizes of a checkpoint in a directory may be left out: its configuration has them. Those of a model of the Hub
    are required, so that a study can be planned without a network. A checkpoint's ``tokens`` only enter the ledger.
    """

    tokens: Count | None = None  #: P
    checkpoint: str | None = None  #: a directory, or a Hub model: org/name[@REVISION]
    hidden: Positive | None = None
    ffn: Positive | None = None
    experts: Positive | None = None  #: routed experts of every layer, in place of one FFN
    active: Positive | None = None  #: experts that each token is routed to
    expert_ffn: Positive | None = None  #: FFN size of an expert
    layers: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    head_dim: Positive | None = None  #: default: hidden / heads
    vocabulary: Positive | None = None  #: of a checkpoint; a pretrained parent has that of the corpus
    tied: bool = False
    #: of a pretrained parent, as in config.json; its pruned models, twins and controls have them too
    rope_theta: Rate | None = None
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: Rate | None = None
    router_balance: Annotated[float, Field(ge=0)] | None = None  #: coefficient of the routers' balance in the loss

    def __post_init__(self) -> None:
        if self.checkpoint and self.config:
            key = next(iter(self.config))
            raise UserError(f"parent.{key}: parent.checkpoint has its own, in its config.json; leave the key out")
        if self.rope_scaling is not None and "rope_type" not in self.rope_scaling:
            raise UserError("parent.rope_scaling: needs a rope_type, as in {rope_type: linear, factor: 4}")
        self._check_experts()
        ffn = "expert_ffn" if self.experts else "ffn"
        sizes = {name: getattr(self, name) for name in ("hidden", ffn, "layers", "heads", "kv_heads")}
        missing = [name for name, size in sizes.items() if size is None]
        if self.checkpoint is None:
            for key in (*missing, *(["tokens"] if self.tokens is None else [])):
                raise UserError(f"parent.{key}: this key is required, unless parent.checkpoint names a model")
            if self.vocabulary is not None:
                raise UserError("parent.vocabulary: a pretrained parent has that of the corpus; set corpus.vocabulary")
        elif missing and len(missing) < len(sizes):
            raise UserError(f"parent.{missing[0]}: give all sizes of the checkpoint, or none")
        if not missing:
            assert self.hidden and self.heads and self.kv_heads
            if self.hidden % self.heads and self.head_dim is None:
                raise UserError(f"parent.hidden: {self.hidden} is not a multiple of parent.heads {self.heads}")
            if self.heads % self.kv_heads:
                raise UserError(f"parent.heads: {self.heads} is not a multiple of parent.kv_heads {self.kv_heads}")

    def _check_experts(self) -> None:
        """Check the keys that make the parent a mixture: all of them or none."""
        keys = ("experts", "active", "expert_ffn")
        missing = [key for key in keys if getattr(self, key) is None]
        if missing and len(missing) < len(keys):
            raise UserError(f"parent.{missing[0]}: a mixture needs {', '.join(keys)}; give all of them, or none")
        if missing and self.router_balance is not None:
            raise UserError("parent.router_balance: goes with parent.experts; leave it out")
        if not missing:
            assert self.experts and self.active
            if self.ffn is not None:
                raise UserError("parent.ffn: layers of a mixture have experts, of size parent.expert_ffn; leave it out")
            if self.active > self.experts:
                raise UserError(f"parent.active: {self.active} is more than parent.experts {self.experts}")

    @property
    def config(self) -> dict[str, Any]:
        """The keys of config.json that the file sets, besides sizes."""
        keys = ("rope_theta", "rope_scaling", "rms_norm_eps", "router_balance")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    def shape(self, vocabulary: int) -> Shape | None:
        """The model's sizes; None if only the checkpoint's configuration has them."""
        if self.hidden is None:
            return None
        assert self.layers and self.heads and self.kv_heads
        head_dim = self.head_dim or self.hidden // self.heads
        sizes = (self.hidden, self.ffn or 0, self.layers, self.heads, self.kv_heads, head_dim)
        shape = Shape(*sizes, self.vocabulary or vocabulary, self.tied)
        if not self.experts:
            return shape
        assert self.expert_ffn and self.active
        experts = {"experts": self.experts, "expert_ffn": self.expert_ffn, "active": self.active}
        return replace(shape, **experts, family=MIXTRAL)


@spec
class ObjectiveSpec(Distill):
    """What the budget of a pruned model's recovery is spent on.

    Training on the language-model loss, or on the divergence from the parent; or the reconstruction of its blocks.
    """

    kind: Literal["language-model", "distill", "reconstruct"]  # type: ignore[assignment]
    name: Label | None = None  #: in records and reports; default: the kind
    #: parent: beside the student; saved: its likeliest ``top_k`` ids of the slice, saved once for all runs
    teacher: Literal["parent", "saved"] = "parent"
    equal: Literal["tokens", "flops"] = (
        "tokens"  #: the quantity it shares with the language-model run of the same budget
    )
    settings: Annotated[tuple[SettingKind, ...] | None, listed()] = None  #: default: the study's
    rate: Annotated[Rate | None, IdentityKey(omit=None)] = None  #: of ``reconstruct``: peak learning rate
    adapter: Adapter | None = None  #: trained in place of the weights, and merged into them; default: none

    def __post_init__(self) -> None:
        if self.kind != "reconstruct" and self.rate is not None:
            raise UserError("retrain.objective.rate: goes with kind: reconstruct; others have retrain.peak_rate")
        if self.kind != "distill" and self.teacher != "parent":
            raise UserError(f"retrain.objective.teacher: {self.teacher} goes with kind: distill; leave it out")
        defaults = Distill(temperature=self.temperature, alpha=self.alpha, top_k=self.top_k)
        if self.kind == "reconstruct" and defaults != Distill():
            raise UserError("retrain.objective: temperature, alpha and top_k go with kind: distill; leave them out")
        if self.kind == "reconstruct" and self.adapter:
            raise UserError("retrain.objective.adapter: reconstruction tunes the weights themselves; leave it out")
        if self.adapter and self.equal == "flops":
            raise UserError("retrain.objective.equal: runs with an adapter share tokens alone; leave equal: flops out")

    @property
    def label(self) -> str:
        """Name in records and reports; empty for the language-model loss of full training."""
        return self.name or self._with_adapter("" if self.kind == "language-model" else self.kind)

    def _with_adapter(self, name: str) -> str:
        return "-".join(part for part in (name, self.adapter.label if self.adapter else "") if part)

    def adapted(self, adapter: Adapter | None) -> ObjectiveSpec:
        """The objective with an adapter, whose label is added to its name."""
        objective = replace(self, adapter=adapter)
        return replace(objective, name=objective._with_adapter(self.name)) if self.name else objective

    @property
    def reconstruction_rate(self) -> float:
        """The peak rate of the reconstruction of blocks."""
        return RATE if self.rate is None else self.rate

    @property
    def distill(self) -> Distill | None:
        """The distillation; None for what has no teacher."""
        if self.kind != "distill":
            return None
        top_k = SAVED_TOP_K if self.teacher == "saved" and self.top_k is None else self.top_k
        return Distill(temperature=self.temperature, alpha=self.alpha, top_k=top_k)


@spec
class RetrainSpec:
    """The training of pruned models. Their from-scratch twins train on the same tokens with the study's recipe."""

    tokens: Budgets  #: R; several budgets form a ladder, each with its own schedule
    peak_rate: Rate | None = None  #: of the pruned runs; default: the recipe's
    objective: Annotated[tuple[ObjectiveSpec, ...], listed("kind"), Field(min_length=1)] = (
        ObjectiveSpec(kind="language-model"),
    )
    #: multiplies the objectives but ``reconstruct``: each trains with every adapter, and all weights for ``none``
    adapter: Annotated[tuple[Adapter | Literal["none"], ...], listed(), Field(min_length=1)] = ("none",)
    #: shared: the budgets of a ladder share one trunk and differ in their decays
    trunk: Literal["own", "shared"] = "own"

    def objectives(self, entries: tuple[ObjectiveSpec, ...] | None = None) -> tuple[ObjectiveSpec, ...]:
        """The objectives of all runs, each with every adapter.

        Args:
            entries: of a method; None for the study's.
        """
        entries, adapters = entries or self.objective, [None if a == "none" else a for a in self.adapter]
        if adapters == [None]:
            return entries
        for entry in entries:
            if entry.adapter:
                raise UserError("retrain.adapter: an objective has an adapter already; give adapters in one place")
        return tuple(
            entry.adapted(adapter)
            for entry in entries
            for adapter in (adapters if entry.kind != "reconstruct" else [None])
        )


@spec
class SettingSpec:
    """A quantity that a from-scratch twin shares with the pruned run."""

    kind: SettingKind
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: the budgets R that it applies to; default: all


@spec
class ControlSpec:
    """A run at equal training tokens that shares a part of what a pruned model inherits, or the parent whole."""

    init: ControlKind
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: as in a setting


@spec
class SeedsSpec:
    """The seeds of a study, and what they vary."""

    values: Annotated[tuple[Seed, ...], listed()] = ()  #: default: the recipe's
    #: all: also the pretrained parent, its calibration windows and its pruning; training: one parent serves all seeds
    vary: Literal["all", "training"] = "all"


def _as_seeds(value: Any) -> Any:
    """Let a file give the seeds alone."""
    return value if isinstance(value, Mapping | SeedsSpec) else {"values": value}


@spec
class DataSpec:
    """The part of the training split that twins read."""

    #: same: from where the pruned run, or at equal total tokens the parent, begins; own-start: from the first token
    twin: Literal["same", "own-start"] = "same"


Seeds = Annotated[SeedsSpec, BeforeValidator(_as_seeds)]
Settings = Annotated[tuple[SettingSpec, ...], listed("kind")]
Controls = Annotated[tuple[ControlSpec, ...], listed("init")]


@spec
class CalibrationSpec:
    """The text that pruning scores are computed on: by default windows of the parent's own training slice."""

    windows: Positive = 128
    seed: int = 42  #: chooses the windows of the slice, or of ``documents`` the places
    source: Annotated[str | None, IdentityKey(omit=None)] = None  #: other text: ``text:PATH``, ``hf:NAME[:config]``
    field: Annotated[str | None, IdentityKey(omit=None)] = None  #: key or column of the text; default: ``text``
    format: Annotated[RowFormat, IdentityKey(omit="text")] = "text"  #: of the records; chat data has its own
    on_bad_row: Annotated[OnBadRow, IdentityKey(omit="error")] = "error"  #: a record that is malformed or not text
    seqlen: Annotated[Positive | None, IdentityKey(omit=None)] = None  #: tokens in a window; default: recipe.sequence
    #: of ``source``: its first tokens, document after document; or a window of each document longer than a window
    protocol: Annotated[Literal["stream", "documents"], IdentityKey(omit="stream")] = "stream"

    def __post_init__(self) -> None:
        for key, default in (("field", None), ("format", "text"), ("on_bad_row", "error"), ("protocol", "stream")):
            if self.source is None and getattr(self, key) != default:
                raise UserError(f"calibration.{key}: goes with calibration.source, which is not given")


@spec
class MethodEntry:
    """A method and how much it removes; missing keys default to those of the study."""

    method: Annotated[str, AfterValidator(_known_method)]
    name: Label | None = None  #: in records and reports; default: the method's
    parent: str | None = None  #: one of several; default: the first
    ratios: Annotated[tuple[Fraction, ...] | None, listed()] = None
    shapes: Mapping[Label, str] | None = None  #: name -> sizes, as in hidden=3072,ffn=9216
    pattern: str | None = None  #: N:M
    of: Literal["total", "non-embedding"] | None = None
    axes: str | None = None
    allocation: Allocation = "uniform"
    step: Annotated[Positive | None, IdentityKey(omit=None)] = None  #: multiple of hidden and FFN sizes
    keep_pattern: Annotated[bool | None, IdentityKey(omit=None)] = None  #: of the layer kinds, for depth methods
    propagate: Annotated[Literal["unpruned", "pruned"], IdentityKey(omit="unpruned")] = "unpruned"  #: for experts
    reconstruct: Annotated[Positive | None, IdentityKey(omit=None)] = None  #: steps that tune each pruned block
    options: Mapping[str, Any] = field(default_factory=dict)
    iterations: Annotated[Positive, IdentityKey(omit=1)] = 1  #: steps of pruning, each followed by a part of retraining
    iteration_schedule: Annotated[IterationSchedule, IdentityKey(omit="linear")] = "linear"  #: of the ratio
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: retrain.tokens
    settings: Settings | None = None
    seeds: Annotated[tuple[Seed, ...] | None, listed()] = None
    controls: Controls | None = None
    twin_init: TwinInit | None = None
    data: DataSpec | None = None
    calibration: CalibrationSpec | None = None
    objective: Annotated[tuple[ObjectiveSpec, ...] | None, listed("kind")] = None  #: retrain.objective

    @property
    def label(self) -> str:
        """Name in records and reports."""
        return self.name or self.method

    def targets(self, ratios: tuple[float, ...]) -> dict[str, Target]:
        """Name -> target of each model that the entry prunes.

        Raises:
            UserError: if two keys say how much to remove, or a target is invalid.
        """
        keys = [key for key in ("ratios", "shapes", "pattern") if getattr(self, key)]
        if len(keys) > 1:
            raise UserError(f"{keys[0]} and {keys[1]} both say how much to remove; make two entries of them")
        names = ("of", "axes", "allocation", "step", "keep_pattern", "propagate")
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.pattern:
            return {self.pattern: Target.parse(pattern=self.pattern, **common)}
        if self.shapes:
            return {name: Target.parse(shape=text, **common) for name, text in self.shapes.items()}
        return {f"{ratio:g}": Target.parse(ratio=ratio, **common) for ratio in self.ratios or ratios}


@spec
class EvaluationSpec:
    """What is measured of every model: its held-out loss and the measurements of ``suite``."""

    windows: Positive = 256  #: spread over the held-out split
    points: Positive = 8  #: measurements along each training run
    suite: Annotated[tuple[str, ...], listed()] = ()  #: names, as for ``secateur eval``
    protocol: str = "heldout"  #: of the perplexities in ``suite``
    text_data: Annotated[str | None, RUNTIME] = None  #: folder of the perplexities' texts; default: the Hub
    tasks_data: Annotated[str | None, RUNTIME] = None  #: folder of the tasks' documents; default: the Hub
    task_limit: Positive | None = None  #: documents of each task; default: all
    few_shot: Annotated[int, Field(ge=0)] | None = None  #: examples in each prompt; default: the task's own
    #: forms of weights in which the held-out loss of the trained models is measured besides
    weights: Annotated[tuple[WeightKind, ...], listed(), IdentityKey(omit=())] = ()

    def __post_init__(self) -> None:
        check_unique("evaluation.weights", self.weights)
        suite = self.measurements
        readers = [
            ("text_data", suite.texts),
            *((key, suite.tasks) for key in ("tasks_data", "task_limit", "few_shot")),
        ]
        for key, names in readers:
            if getattr(self, key) is not None and not names:
                raise UserError(f"evaluation.{key}: nothing in evaluation.suite uses it")

    @property
    def measurements(self) -> Suite:
        """The parsed ``suite``."""
        if not self.suite:
            return Suite(loss=True)
        return Suite.parse(",".join(self.suite), self.protocol, where="evaluation.")


@spec
class SweepSpec:
    """Learning rates to try for each run of the first seed; the other seeds train at the rate that it chose."""

    rates: Annotated[tuple[Rate, ...], Field(min_length=2)]
    parent: bool | Annotated[tuple[Rate, ...], Field(min_length=2)] = False  #: also of parents; or rates of their own
    tokens: Count | None = None  #: of each trial; default: the run's own, and the best trial is the run
    windows: Positive = 64  #: held-out windows that choose the rate, none of them in ``evaluation``

    def __post_init__(self) -> None:
        check_unique("sweep.rates", self.rates)
        check_unique("sweep.parent", self.parent_rates)

    @property
    def parent_rates(self) -> tuple[float, ...]:
        """Rates to try for parents that the study pretrains; empty for none."""
        if isinstance(self.parent, bool):
            return self.rates if self.parent else ()
        return self.parent


@spec
class ComputeSpec:
    """How stages compute."""

    dtype: Literal["float32", "bfloat16"] = "float32"  #: of the forward pass in training; weights and sums are float32
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = "auto"
    processes: Annotated[Positive, RUNTIME] = 1  #: of each stage that trains or prunes
    replicas: Annotated[Positive, RUNTIME] = 1  #: groups of processes that each hold the whole model
    recompute: Annotated[bool, RUNTIME] = False
    compile: Annotated[bool, RUNTIME] = False


@spec
class Exclude:
    """A rule that leaves out cells: those that have, for every key of the rule, one of its values."""

    method: Annotated[tuple[str, ...] | None, listed()] = None  #: an entry's name
    target: Annotated[tuple[str | float, ...] | None, listed()] = None
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: R
    seed: Annotated[tuple[Seed, ...] | None, listed()] = None
    objective: Annotated[tuple[str, ...] | None, listed()] = None
    setting: Annotated[tuple[SettingKind, ...] | None, listed()] = None
    control: Annotated[tuple[ControlKind, ...] | None, listed()] = None

    def __post_init__(self) -> None:
        if not any(getattr(self, f.name) for f in fields(self)):
            raise UserError("exclude: an entry needs at least one key, as in {seed: 1, setting: equal_total_tokens}")

    def covers(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell has, for every key of the rule, one of its values."""
        rule = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        rule |= {"target": [v if isinstance(v, str) else f"{v:g}" for v in self.target]} if self.target else {}
        return all(cell.get(key) in values for key, values in rule.items())


def check_unique(key: str, values: Any) -> None:
    """Refuse a key whose list has an entry twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise UserError(f"{key}: an entry appears twice: {value}")
