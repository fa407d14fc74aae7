"""Made-up results of small studies for tests: three methods, one ratio, one seed; and larger and broken ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from secateur.comparison.records import Cell, Cost, Evaluation, Parent, Point, PrunedModel, StageNote, StudyResults
from secateur.report.judgement import Judgement, judge
from secateur.report.page import render
from secateur.report.terminal import text_table

P, R = 700_000, 200_000
PROTOCOL = "5d0e2b6c9f1a4e77a3c1"
WINDOWS = 64
VOCABULARY = 2048
NAMES = ("P-R", "S_R", "S_{P+R}")
SHAPE = {"hidden": 192, "ffn": 512, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32}
SCORING = Cost(16_384, 5.6e10, 3.2)

#: method -> granularity, before retraining, P-R, S_R, S_{P+R}, share removed (total, non-embedding), detail
METHODS: dict[str, tuple[Any, float, float, float, float, float, float, str]] = {
    "minitron-depth": ("depth", 5.47, 5.41, 5.86, 5.13, 0.346, 0.5, "layers 2-4 of 6 removed"),
    "minitron-width": ("width", 6.12, 5.44, 5.79, 5.437, 0.412, 0.489, "hidden 192 to 128, FFN 512 to 320 channels"),
    "wanda": ("sparse", 5.66, 5.35, 5.73, 5.21, 0.35, 0.5, "half of every output row zeroed, unstructured"),
}


def evaluation(loss: float, salt: int = 0, *, windows: int = WINDOWS, protocol: str = PROTOCOL) -> Evaluation:
    """Window losses with a shared difficulty and a little noise by ``salt``, whose mean is exactly ``loss``."""
    shared = np.random.default_rng(7).normal(0.0, 0.3, windows)
    noise = np.random.default_rng(1000 + salt).normal(0.0, 0.05, windows)
    values = shared + noise
    values += loss - values.mean()
    means = tuple(float(value) for value in values)
    return Evaluation(loss, math.exp(loss), 255 * windows, protocol, means, 0.0)


def t_interval(differences: Any) -> tuple[float, float]:
    """95% interval of the mean of independent, equally weighted differences, by Student's t on the jackknife."""
    from scipy.stats import t

    values = [float(value) for value in differences]
    n, mean = len(values), sum(values) / len(values)
    half = t.ppf(0.975, n - 1) * math.sqrt(sum((value - mean) ** 2 for value in values)) / (n - 1)
    return mean - half, mean + half


def curve(start: float, end: float, tokens: int, points: int = 12) -> tuple[Point, ...]:
    """An exponential decay from ``start`` to ``end`` with ``points`` + 1 evenly spaced evaluations."""
    steps = [i / points for i in range(points + 1)]
    return tuple(Point(round(tokens * s), end + (start - end) * (math.exp(-5 * s) - math.exp(-5) * s)) for s in steps)


def cell(
    method: str,
    name: str,
    loss: float | None,
    *,
    target: str = "0.5",
    seed: int = 0,
    salt: int = 0,
    tokens: int = R,
    objective: str = "",
    init: Any = None,
    parent: str = "parent",
    training_flops: float | None = None,
) -> Cell:
    """A cell of the comparison at R = ``tokens``; its own training tokens follow from ``name``."""
    granularity, before, *_, total, dense, _ = METHODS[method]
    path = "pruned" if name == "P-R" else "scratch" if name.startswith("S_") else "control"
    train_tokens = P + tokens if name in ("S_{P+R}", "S_{P+F}") else tokens
    parameters = 1_712_640 if granularity == "sparse" else round(1_712_640 * (1 - total))
    non_embedding = 1_188_352 if granularity == "sparse" else round(1_188_352 * (1 - dense))
    flops = 6.0 * parameters * train_tokens * (1.5 if objective and path == "pruned" else 1.0)
    init = init or ("pruned" if path == "pruned" else "redrawn" if granularity == "sparse" else "scratch")
    start = before if path == "pruned" else math.log(VOCABULARY)
    measured = None if loss is None else dataclasses.replace(evaluation(loss, salt), sparsity=_zeros(granularity))
    return Cell(
        name=name,
        path=path,
        init=init,
        parent=parent,
        method=method,
        granularity=granularity,
        target=target,
        ratio=0.5 if ":" in target else float(target),
        retrain_tokens=tokens,
        objective=objective,
        seed=seed,
        parameters=parameters,
        non_embedding=non_embedding,
        training=Cost(train_tokens, training_flops or flops, 12.5),
        pruning=SCORING if init in ("pruned", "redrawn", "shuffled-weights", "permuted") else None,
        sweep=None,
        peak_rate=5e-4 if path == "pruned" else 3e-3,
        curve=() if loss is None else curve(start, loss, train_tokens, 12 if train_tokens == tokens else 30),
        evaluation=measured,
        shape=dict(SHAPE),
        stages=_stage_fingerprints(method, name),
    )


def _stage_fingerprints(method: str, name: str) -> tuple[str, ...]:
    """Fingerprints of the example's stages that a run depends on."""
    names = ["tokenizer", "parent", f"{method}/0.5/prune", f"{method}/0.5/train", f"{method}/0.5/evaluate"]
    notes = [note for note in _stages() if note.name in names and (name == "P-R" or note.kind != "prune")]
    return tuple(note.fingerprint for note in sorted(notes, key=lambda note: names.index(note.name)))


def _zeros(granularity: str) -> float:
    return 0.5 if granularity == "sparse" else 0.0


def pruned(method: str, *, target: str = "0.5", parent: str = "parent") -> PrunedModel:
    granularity, before, *_, total, dense, detail = METHODS[method]
    return PrunedModel(
        parent=parent,
        method=method,
        granularity=granularity,
        target=target,
        ratio=0.5 if ":" in target else float(target),
        ratio_total=total,
        ratio_non_embedding=dense,
        shape=dict(SHAPE),
        cost=SCORING,
        detail=detail,
        evaluation=evaluation(before, 50),
        layers=_layers(granularity),
    )


def _layers(granularity: str) -> tuple[dict[str, Any], ...]:
    """Six layers: some removed, narrowed or sparse, by granularity."""
    if granularity == "depth":
        return tuple({"kept": not 2 <= i <= 4, "ffn": 512, "kv": 2, "sparsity": None} for i in range(6))
    if granularity == "width":
        return tuple({"kept": True, "ffn": 320, "kv": 2, "sparsity": None} for _ in range(6))
    return tuple({"kept": True, "ffn": 512, "kv": 2, "sparsity": 0.4 + 0.04 * i} for i in range(6))


def parent() -> Parent:
    return Parent(
        name="parent",
        shape={**SHAPE, "vocabulary": VOCABULARY, "tied": False},
        parameters=1_712_640,
        non_embedding=1_188_352,
        cost=Cost(P, 7.2e12, 95.4),
        children=len(METHODS),
        curve=curve(math.log(VOCABULARY), 5.44, P, 24),
        evaluation=evaluation(5.44, 99),
    )


def _stages() -> tuple[StageNote, ...]:
    rows = [("tokenizer", "tokenize", 2.1), ("parent", "pretrain", 95.4), ("parent/evaluate", "evaluate", 1.9)]
    rows += [(f"{m}/0.5/{k}", k, s) for m in METHODS for k, s in (("prune", 3.2), ("train", 41.0), ("evaluate", 1.8))]
    return tuple(
        StageNote(name, kind, f"{i:02d}9f3ac4{i * 7919:08x}d21b", "done", seconds, f"stages/{i:02d}-{kind}")
        for i, (name, kind, seconds) in enumerate(rows)
    )


@cache
def example() -> StudyResults:
    """A complete study with every value measured."""
    cells = [
        cell(method, name, row[2 + i], salt=10 * m + i)
        for m, (method, row) in enumerate(METHODS.items())
        for i, name in enumerate(NAMES)
    ]
    return StudyResults(
        name="demo",
        title="Prune a small language model, or train it from scratch?",
        fingerprint="c0ffee5ca1ab1e0ddba11ba5eba11f1a5c0",
        parents=(parent(),),
        pruned=tuple(pruned(method) for method in METHODS),
        cells=tuple(cells),
        corpus={
            "source": "secateur's own grammar, seed 0",
            "documents": 4812,
            "tokens": 1_204_992,
            "train sha256": "9b74c9897bac770ffc029102a200c5de1f0b5d1c9a2b7d6e6a1f0c3d2b4a5968",
            "held-out sha256": "3f79bb7b435b05321651daefd374cdc681dc06faa65e374e38337b88ca046dea",
        },
        protocol={"windows": WINDOWS, "seqlen": 256, "tokens": 255 * WINDOWS, "fingerprint": PROTOCOL},
        recipe={
            "optimizer": "AdamW",
            "betas": [0.9, 0.95],
            "peak learning rate": 0.003,
            "schedule": {"shape": "cosine", "to": 0.1, "warm-up": 0.05},
            "weight decay": 0.1,
            "sequences a step": 16,
        },
        stages=_stages(),
        environment={"secateur": "0.1.0", "torch": "2.11.0", "device": "cpu", "threads": "2"},
        study_yaml="name: demo\nmethods: [minitron-depth, minitron-width, wanda]\nratios: [0.5]\n",
    )


@cache
def large() -> StudyResults:
    """Two methods at two ratios, a ladder of three R, two seeds, every setting, controls, distillation.

    Gaps narrow with R and with the ratio. At equal total tokens Wanda beats its twin and Minitron-depth does not.
    """
    cells: list[Cell] = []
    for method, target, tokens, seed in itertools.product(("minitron-depth", "wanda"), ("0.5", "0.75"), LADDER, (0, 1)):
        cells += _rung(method, target, tokens, seed)
    base = example()
    return dataclasses.replace(
        base,
        name="ladder",
        title="A ladder of budgets, with controls",
        parents=(dataclasses.replace(base.parents[0], children=4),),
        pruned=tuple(pruned(m, target=t) for m in ("minitron-depth", "wanda") for t in ("0.5", "0.75")),
        cells=tuple(cells),
        recipe={**base.recipe, "sequence": 256},
    )


LADDER = (50_000, 200_000, 800_000)


def _rung(method: str, target: str, tokens: int, seed: int) -> list[Cell]:
    """All cells of one comparison under the language-model loss, and the distilled one beside it."""
    step = LADDER.index(tokens)
    at: dict[str, Any] = {"target": target, "tokens": tokens, "seed": seed}
    salts = itertools.count(100 * seed + 1000 * step + (50 if target == "0.5" else 0))
    p_r = 5.4 - 0.1 * step + (0.4 if target == "0.75" else 0.0) + 0.01 * seed
    gap = (0.5 - 0.15 * step) * (1.0 if target == "0.5" else 0.4)
    total = 0.1 if method == "wanda" else -0.2
    losses = {"P-R": p_r, "S_R": p_r + gap, "S_{P+R}": p_r + total, "S_F": p_r + gap - 0.01, "S_{P+F}": p_r + total / 2}
    cells = [cell(method, name, loss, salt=next(salts), **at) for name, loss in losses.items()]
    if method == "wanda" and tokens == R:
        controls = {"random-mask": gap + 0.1, "permuted": gap + 0.08, "shuffled-weights": gap / 2, "dense-twin": gap}
        cells += [cell(method, n, p_r + more, salt=next(salts), init=n, **at) for n, more in controls.items()]
        cells.append(cell(method, "scratch", p_r + gap - 0.2, salt=next(salts), init="scratch", **at))
    if target == "0.5":
        distilled = {"objective": "distillation", **at}
        cells.append(cell(method, "P-R", p_r - 0.05, salt=next(salts), **distilled))
        if method == "wanda":  # the twin serves this comparison as well
            cells.append(dataclasses.replace(cells[1], objective="distillation"))
    return cells


@cache
def broken() -> StudyResults:
    """A broken study: ratios and seeds, a failed evaluation, a missing run, another protocol, a diverged model."""
    base = example()
    cells = [
        cell(
            method,
            name,
            METHODS[method][2 + i] + 0.2 * (float(target) - 0.5),
            target=target,
            seed=seed,
            salt=i + 7 * seed,
        )
        for method in ("minitron-depth", "wanda")
        for target in ("0.5", "0.75")
        for seed in (0, 1)
        for i, name in enumerate(NAMES)
    ]
    del cells[-1]  # wanda at 0.75, seed 1, has no S_{P+R}
    cells[1] = cell("minitron-depth", "S_R", None)
    foreign = dataclasses.replace(evaluation(5.4), protocol="another")
    cells[3] = dataclasses.replace(cells[3], evaluation=foreign)
    cells[6] = dataclasses.replace(cells[6], curve=curve(11.8, 5.46, R))
    failed = StageNote("minitron-depth/0.5/S_R/train", "train", "ab" * 16, "failed", 12.5, "stages/98", "loss is NaN")
    absent = StageNote("wanda/0.75/1/S_{P+R}/train", "train", "cd" * 16, "missing", None, "stages/99")
    records = [pruned(method, target=target) for method in ("minitron-depth", "wanda") for target in ("0.5", "0.75")]
    records[0] = dataclasses.replace(records[0], evaluation=None)
    stages = (*base.stages, failed, absent)
    return dataclasses.replace(base, cells=tuple(cells), pruned=tuple(records), stages=stages)


@cache
def judged(make: Callable[[], StudyResults]) -> Judgement:
    """The judgement of one of the studies above, computed once: the large one takes seconds."""
    return judge(make())


@cache
def judged_text(make: Callable[[], StudyResults]) -> str:
    """The text table of :func:`judged`."""
    return text_table(judged(make))


@cache
def judged_page(make: Callable[[], StudyResults]) -> str:
    """The report page of :func:`judged`."""
    return render(judged(make))
