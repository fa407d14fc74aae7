"""The records of a study as plain values, without files, models or clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.evaluation.results import Measurement
from secateur.formatting import plural
from secateur.model.families import Granularity

__all__ = [
    "Cell",
    "Cost",
    "DecisiveComparison",
    "Declaration",
    "DocumentLoss",
    "Evaluation",
    "Init",
    "Parent",
    "Point",
    "PrunedModel",
    "Running",
    "SeedsVary",
    "StageNote",
    "StudyQuestion",
    "StudyResults",
    "Sweep",
    "TextUnit",
    "Units",
    "pair_units",
]

TextUnit = Literal["documents", "windows of known documents", "windows"]

Init = Literal[
    "pruned",  # the parent's weights under the plan
    "scratch",  # new weights; of a sparse cell, the parent's whole architecture
    "redrawn",  # the parent's mask, new weights
    "redrawn-linears",  # the parent's mask, embeddings and norms, new weights of linears
    "permuted",  # that mask with its rows and columns permuted, new weights
    "random-mask",  # as many weights kept in each linear, at random, new weights
    "shuffled-weights",  # the kept weights of the parent, permuted within each tensor
    "dense-twin",  # new weights, and as many of them as the sparse model keeps, dense
    "dense-active",  # new weights, dense, as many parameters as a token uses of the pruned mixture
    "dense-total",  # new weights, dense, as many parameters as the pruned mixture has
    "without-pruning-tokens",  # new weights, without the tokens that pruning itself trained on
    "parent-continued",  # the parent's weights, none of them pruned
]


#: What seeds vary. "training": the order of the data and fresh weights; "all": also the parent and its pruning.
SeedsVary = Literal["all", "training"]


@dataclass(frozen=True)
class Point:
    """One held-out evaluation along a training run."""

    tokens: int  #: tokens that this run has trained on so far
    loss: float  #: held-out loss, nats per token


@dataclass(frozen=True)
class DocumentLoss:
    """The loss of a held-out document, summed over its predicted tokens inside the windows."""

    number: int  #: of the document in its protocol
    tokens: int  #: predicted tokens
    loss_sum: float  #: nats


@dataclass(frozen=True)
class Units:
    """The pieces of held-out text that comparisons pair, as arrays [units]."""

    unit: TextUnit  #: "windows": their documents are not known, and each counts as one of its own
    values: NDArray[np.float64]  #: mean loss of each, nats per predicted token
    weights: NDArray[np.float64]  #: predicted tokens of each
    documents: NDArray[np.int64]  #: document, or cluster of documents, that each belongs to


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of one checkpoint under one protocol."""

    loss: float  #: mean negative log-likelihood, nats per predicted token
    perplexity: float  #: exp(loss)
    tokens: int  #: predicted tokens
    protocol: str  #: fingerprint of the protocol; figures of different protocols are never compared
    windows: tuple[float, ...]  #: mean loss of each held-out window, in order
    sparsity: float  #: share of exact zeros among the block linears' weights
    measured: tuple[Measurement, ...] = ()  #: this loss by document, then perplexities and tasks, with their items
    documents: tuple[DocumentLoss, ...] = ()  #: empty in records of older versions
    window_documents: tuple[int, ...] = ()  #: cluster of each window, where only windows were recorded; empty: unknown
    window_tokens: tuple[int, ...] = ()  #: predicted tokens of each window; empty for the same in each
    bytes: int | None = None  #: of the weights as served; None for the stored ones

    def units(self) -> Units:
        """The units to pair: documents; where they were not recorded, windows."""
        return pair_units(self, self)[0]


def pair_units(first: Evaluation, second: Evaluation) -> tuple[Units, Units]:
    """The units of two evaluations under one protocol, the same ones in the same order.

    Documents if both recorded them, else windows. Windows that share a document are one cluster where that is known.

    Raises:
        ValueError: if the two have different numbers of windows.
    """
    tokens_by_document = [[document.tokens for document in side.documents] for side in (first, second)]
    if tokens_by_document[0] and tokens_by_document[0] == tokens_by_document[1]:
        return _document_units(first), _document_units(second)
    if len(first.windows) != len(second.windows):
        raise ValueError(f"{len(first.windows)} and {plural(len(second.windows), 'window')} cannot be paired")
    clusters = first.window_documents or second.window_documents
    tokens = first.window_tokens or second.window_tokens or (1,) * len(first.windows)
    unit: TextUnit = "windows of known documents" if clusters else "windows"
    documents = np.asarray(clusters or range(len(first.windows)), dtype=np.int64)
    weights = np.asarray(tokens, dtype=np.float64)
    values = [np.asarray(evaluation.windows, dtype=np.float64) for evaluation in (first, second)]
    return Units(unit, values[0], weights, documents), Units(unit, values[1], weights, documents)


def _document_units(evaluation: Evaluation) -> Units:
    tokens = np.asarray([document.tokens for document in evaluation.documents], dtype=np.float64)
    sums = np.asarray([document.loss_sum for document in evaluation.documents], dtype=np.float64)
    numbers = np.asarray([document.number for document in evaluation.documents], dtype=np.int64)
    return Units("documents", sums / tokens, tokens, numbers)


@dataclass(frozen=True)
class Running:
    """What a model costs to run, measured on one device."""

    device: str
    dtype: str
    figures: tuple[Mapping[str, Any], ...]  #: each with ``name``, ``value``, ``unit``, ``execution`` and more
    note: str  #: what its zeros gain

    def figure(self, name: str, execution: str = "dense") -> Mapping[str, Any] | None:
        """A figure of that name, at the smallest batch; None where it was not measured."""
        figures = [f for f in self.figures if f["name"] == name and f["execution"] == execution]
        return min(figures, key=lambda figure: figure.get("batch", 0), default=None)


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    tokens: int
    flops: float  #: by formula (:meth:`secateur.model.shapes.Shape.forward_flops`)
    seconds: float | None = None  #: measured, times the devices (GPUs, or CPU cores) at work; None: not measured

    def __add__(self, other: Cost) -> Cost:
        seconds = None if self.seconds is None or other.seconds is None else self.seconds + other.seconds
        return Cost(self.tokens + other.tokens, self.flops + other.flops, seconds)


@dataclass(frozen=True)
class Parent:
    """A model that is pruned."""

    name: str  #: as the study file calls it
    shape: dict[str, Any]  #: hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary, tied
    parameters: int
    non_embedding: int
    cost: Cost | None  #: of its pretraining, P tokens; None for a public checkpoint whose tokens the study does not say
    children: int  #: pruned models that the study makes of it: they share its cost in the account "shared"
    curve: tuple[Point, ...]  #: empty for a public checkpoint
    evaluation: Evaluation | None  #: None: not measured, or failed
    running: Running | None = None  #: None: not measured; of several seeds, the first is measured
    sweep: Cost | None = None  #: as of :class:`Cell`
    seed: int | None = None  #: None: shared by all seeds


@dataclass(frozen=True)
class PrunedModel:
    """One pruned model before any retraining."""

    parent: str
    method: str  #: as the study file calls it: the method's name, or a label of its own
    granularity: Granularity
    target: str  #: as requested, e.g. "0.5", "4b-depth" or "2:4"
    ratio: float  #: as asked; the achieved share (non-embedding, or of the blocks' weights) for shapes and patterns
    ratio_total: float  #: share of all parameters removed (zeroed, for sparse)
    ratio_non_embedding: float  #: the same without embeddings and head
    shape: dict[str, Any]
    cost: Cost  #: of scoring, or of learning what to cut
    detail: str  #: one line, e.g. "layers 2-4 removed"
    evaluation: Evaluation | None
    layers: tuple[dict[str, Any], ...] = ()  #: for each layer of the parent: kept (bool), ffn, kv, sparsity
    running: Running | None = None  #: of all that is trained of it, and of its twins; measured of the first seed
    seed: int | None = None  #: None: shared by all seeds
    training_tokens: int = 0  #: L, tokens that pruning itself trained on; its twins train on as many more
    tuned: bool = False  #: whether those tokens tuned its blocks, after the cut
    steps: tuple[float, ...] = ()  #: the ratio after each of several steps; empty for one step
    schedule: str = ""  #: how the ratio grows from step to step; empty for one step
    series: str = ""  #: equal for models of one target that differ in their steps alone; empty: not recorded


@dataclass(frozen=True)
class Teaching:
    """The work of saving a teacher's log-probabilities of a slice, which several runs may learn from."""

    parent: str
    top_k: int
    cost: Cost
    size: int | None  #: bytes on disk; None: not saved yet
    stage: str  #: fingerprint: runs that share the work have the same


@dataclass(frozen=True)
class Cell:
    """One trained model: a path under a budget.

    ``parent``, ``method``, ``target``, ``retrain_tokens``, ``objective`` and ``seed`` name the comparison that it
    belongs to; a model that serves several comparisons is a cell of each.
    """

    name: str  #: "P-R"; "S_R", "S_{P+R}", "S_F" or "S_{P+F}"; a control's is its init
    path: Literal["pruned", "scratch", "control"]
    init: Init  #: where its weights are from
    parent: str
    method: str
    granularity: Granularity
    target: str
    ratio: float
    retrain_tokens: int  #: R of its comparison
    objective: str  #: of the comparison's pruned run: "" for the language-model loss
    seed: int
    parameters: int
    non_embedding: int  #: those that are not zeroed, outside the embeddings
    training: Cost  #: of this run alone, the teacher's forward passes counted
    pruning: Cost | None  #: of the scoring that it rests on: the pruned model's, or that of the mask it took over
    sweep: Cost | None  #: of the trials that chose its rate, without a trial that is the run; None: no sweep
    peak_rate: float | None  #: None: not chosen yet
    curve: tuple[Point, ...]  #: begins at tokens = 0, before the first step
    evaluation: Evaluation | None  #: at the end; None: not measured, or failed
    shape: dict[str, Any]  #: as of :class:`Parent`
    stages: tuple[str, ...]  #: fingerprints of all that it is made from, each after its inputs, and of what measured it
    teaching: Teaching | None = None  #: of the saved teacher that it learns from; None without one
    #: held-out loss with the weights in each form that the study serves; None: not measured, or failed
    served: Mapping[str, Evaluation | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """The trials that chose the learning rate of one run, at one seed for all."""

    name: str  #: of the run, as in :class:`Cell`; "parent" for a parent's pretraining
    parent: str
    method: str  #: this and the next two are empty for a parent
    target: str
    objective: str
    retrain_tokens: int  #: R of the comparison; 0 for a parent
    seed: int  #: of the trials
    tokens: int  #: of each trial
    whole: bool  #: whether trials have all tokens of the run, so that the best one is the run
    rates: tuple[float, ...]
    losses: tuple[float | None, ...]  #: of each rate, nats per token; None: diverged, or not measured yet
    rate: float | None  #: that has the lowest loss; None: not chosen yet
    at_edge: Literal["low", "high"] | None  #: the best rate is the lowest or highest, so that it may lie beyond
    cost: Cost  #: of the trials, without one that is the run
    stage: str  #: fingerprint of the choice: several runs may share one


@dataclass(frozen=True)
class StageNote:
    """Provenance of one stage."""

    name: str
    kind: str
    fingerprint: str
    state: Literal["done", "missing", "failed"]
    seconds: float | None  #: wall time of the attempt that finished it; None where it is unknown
    folder: str  #: relative to the study's folder
    error: str = ""


@dataclass(frozen=True)
class DecisiveComparison:
    """A comparison that decides a study's question, all its seeds together."""

    twin: str  #: the from-scratch run, such as "S_R"
    parent: str
    method: str
    target: str
    retrain_tokens: int  #: R, as of :class:`Cell`
    objective: str


@dataclass(frozen=True)
class StudyQuestion:
    """The question that a study file declares."""

    hash: str  #: fingerprint of its content
    content: dict[str, Any]  #: the fields below, and the seeds of each comparison, as plain values
    comparisons: tuple[DecisiveComparison, ...]
    metric: str  #: "loss": of held-out text
    margin: float  #: nats per token that count as equal; 0: none do
    ask: str | None = None
    yes: str | None = None  #: what would count as yes
    no: str | None = None  #: what would count as no


@dataclass(frozen=True)
class Declaration:
    """A question as the study's folder recorded it."""

    hash: str | None  #: None: the question was withdrawn
    stages_done: int  #: finished stages of the study at that time
    question: dict[str, Any] | None  #: its content


@dataclass(frozen=True)
class StudyResults:
    """Everything that the page shows."""

    name: str
    title: str
    fingerprint: str  #: of the study's specification
    parents: tuple[Parent, ...]  #: for each seed, where seeds vary them; the first is the study file's own
    pruned: tuple[PrunedModel, ...]
    cells: tuple[Cell, ...]
    corpus: dict[str, Any]  #: source, documents, tokens, hashes
    protocol: dict[str, Any]  #: of the held-out evaluation: windows, seqlen, tokens, fingerprint
    recipe: dict[str, Any]  #: of the training
    stages: tuple[StageNote, ...]
    environment: dict[str, str] = field(default_factory=dict)  #: versions, device, threads
    #: all: each seed has its own pretrained parent and its own pruning; training: all seeds share them
    seeds_vary: SeedsVary = "training"
    question: StudyQuestion | None = None  #: that the study file declares
    declarations: tuple[Declaration, ...] = ()  #: the questions that the study's folder records, in their order
    stages_done: int = 0  #: finished stages of the study, when its records were collected
    sweeps: tuple[Sweep, ...] = ()  #: of parents, then of runs
    study_yaml: str = ""  #: the study file's text
