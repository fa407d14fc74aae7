"""What a report is made of: the study's records as plain values. No file, no model and no clock is known here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Cell", "Evaluation", "Parent", "Point", "Pruned", "Results", "StageNote"]


@dataclass(frozen=True)
class Point:
    """One held-out evaluation along a training run."""

    tokens: int  #: tokens that this run has trained on so far
    loss: float  #: held-out loss, nats per token


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of one checkpoint under one protocol."""

    loss: float  #: mean negative log-likelihood, nats per predicted token
    perplexity: float  #: exp(loss)
    tokens: int  #: predicted tokens
    protocol: str  #: fingerprint of the protocol; figures of different protocols are never compared
    windows: tuple[float, ...]  #: mean loss of each held-out window, in order: what makes comparisons paired
    sparsity: float  #: share of exact zeros among the block linears' weights


@dataclass(frozen=True)
class Parent:
    """The model that is pruned."""

    shape: dict[str, Any]  #: hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary, tied
    parameters: int
    non_embedding: int
    tokens: int  #: P, the tokens that it was pretrained on
    flops: float  #: of its pretraining
    curve: tuple[Point, ...]
    evaluation: Evaluation | None  #: None: not measured, or failed


@dataclass(frozen=True)
class Pruned:
    """One pruned model before any retraining."""

    method: str
    granularity: Literal["depth", "width", "sparse"]
    ratio: float  #: as asked
    ratio_total: float  #: share of all parameters removed (zeroed, for sparse)
    ratio_non_embedding: float  #: the same without embeddings and head
    shape: dict[str, Any]
    calibration_tokens: int
    flops: float  #: of scoring
    detail: str  #: one line, e.g. "layers 2-4 removed"
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Cell:
    """One trained model: a path (pruned or scratch) under a token budget."""

    name: str  #: "P-R", "S_R" or "S_{P+R}"
    path: Literal["pruned", "scratch"]
    method: str
    granularity: Literal["depth", "width", "sparse"]
    ratio: float
    seed: int
    parameters: int
    non_embedding: int
    train_tokens: int  #: tokens of this run alone (R, or P+R)
    total_tokens: int  #: with the parent's, for the pruned path
    train_flops: float
    total_flops: float  #: with the parent's pretraining and the scoring, for the pruned path
    curve: tuple[Point, ...]  #: begins at tokens = 0, before the first step
    evaluation: Evaluation | None  #: at the end; None: not measured, or failed


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
class Results:
    """Everything that the page shows."""

    name: str
    title: str
    fingerprint: str  #: of the study's specification
    parent_tokens: int  #: P
    retrain_tokens: int  #: R
    parent: Parent
    pruned: tuple[Pruned, ...]
    cells: tuple[Cell, ...]
    corpus: dict[str, Any]  #: source, documents, tokens, hashes
    protocol: dict[str, Any]  #: of the held-out evaluation: windows, seqlen, tokens, fingerprint
    recipe: dict[str, Any]  #: of the training
    stages: tuple[StageNote, ...]
    environment: dict[str, str] = field(default_factory=dict)  #: versions, device, threads
    study_yaml: str = ""  #: the study file's text
