"""From a study to its stages: a pure function. Nothing is read, run or written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from secateur.methods import get_method
from secateur.prune import scoring_flops
from secateur.shapes import Shape, train_flops
from secateur.spec import fingerprint, identity
from secateur.study.spec import Study
from secateur.target import Target

__all__ = ["PATHS", "Stage", "stages_of", "unique"]

Kind = Literal["corpus", "train", "prune", "evaluate"]

#: Raised when a stage of the kind would give other results from the same identity.
VERSIONS: dict[Kind, int] = {"corpus": 2, "train": 3, "prune": 3, "evaluate": 1}

#: What a cell is called in records and reports, and the settings that need it.
PATHS = {
    "P-R": ("equal_training_tokens", "equal_total_tokens"),
    "S_R": ("equal_training_tokens",),
    "S_{P+R}": ("equal_total_tokens",),
}


@dataclass(frozen=True)
class Stage:
    """One step of a study, found again by what it is and what it is made from.

    Attributes:
        name: for people; not part of the identity.
        identity: everything that changes the result, as plain values.
        inputs: role -> the stage whose folder is read.
        runtime: how to run it; not part of the identity.
        facts: what the report needs to know of the stage (method, ratio, path); derived, not part of the identity.
    """

    kind: Kind
    name: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    tokens: int = 0  #: that it trains or scores on
    flops: float = 0.0
    runtime: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kind, its version, the identity and the inputs' fingerprints."""
        made_from = {role: stage.fingerprint for role, stage in self.inputs.items()}
        return fingerprint([self.kind, VERSIONS[self.kind], self.identity, made_from])

    @property
    def folder(self) -> str:
        """The name of its folder."""
        slug = self.name.replace("/", "-").translate(str.maketrans("", "", "{}"))
        return f"{self.kind}-{slug}-{self.fingerprint[:12]}"


def unique(stages: Iterable[Stage]) -> list[Stage]:
    """The stages to run: of equal ones, which different cells may share, the first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found.setdefault(stage.fingerprint, stage)
    return list(found.values())


def stages_of(study: Study, corpus_digest: str) -> list[Stage]:
    """All stages of a study, each after its inputs.

    Two cells may need the same stage, e.g. when two ratios come to one shape: it is listed for each, under one
    fingerprint.

    Args:
        study: the study.
        corpus_digest: identifies the content of its text source.

    Raises:
        UserError: if the parent has no shape at one of the ratios.
    """
    built: list[Stage] = []

    def add(stage: Stage) -> Stage:
        built.append(stage)
        return stage

    corpus = add(Stage("corpus", "corpus", {**identity(study.corpus), "digest": corpus_digest}))
    shape = study.parent.shape(study.corpus.vocabulary)
    parent = add(_train(study, "parent", corpus, shape, 0, study.parent.tokens, {"path": "parent"}, init="random"))
    add(_evaluate(study, corpus, parent))
    for method in study.methods:
        found = get_method(method)
        for ratio in study.ratios:
            after = Target(ratio=ratio).shape(shape, found, method)
            facts = {"method": method, "granularity": found.granularity, "ratio": ratio}
            tokens = study.calibration.windows * study.recipe.sequence
            pruned = add(
                Stage(
                    "prune",
                    f"{method}-{ratio:g}",
                    {
                        "method": method,
                        "ratio": ratio,
                        "calibration": identity(study.calibration),
                        "seqlen": study.recipe.sequence,
                        "slice": [0, study.parent.tokens],
                    },
                    {"corpus": corpus, "model": parent},
                    tokens,
                    scoring_flops(shape, after, found, tokens, study.recipe.sequence),
                    facts={**facts, "path": "pruned", "shape": after},
                )
            )
            add(_evaluate(study, corpus, pruned))
            for name, settings in PATHS.items():
                if set(settings) & set(study.settings):
                    cell = add(_cell(study, name, facts, corpus, pruned, after))
                    add(_evaluate(study, corpus, cell))
    return built


def _cell(study: Study, name: str, facts: Mapping[str, Any], corpus: Stage, pruned: Stage, shape: Shape) -> Stage:
    """One trained model of one method and ratio."""
    start, total = study.parent.tokens, study.parent.tokens + study.retrain.tokens
    begin = 0 if name == "S_{P+R}" else start
    label = f"{facts['method']}-{facts['ratio']:g}/{name}"
    facts = {**facts, "path": name}
    if name == "P-R":
        return _train(study, label, corpus, shape, begin, total, facts, init="pruned", source=pruned)
    if facts["granularity"] == "sparse":
        return _train(study, label, corpus, shape, begin, total, facts, init="redrawn", source=pruned)
    # A dense twin needs the shape alone, so it need not wait for the parent.
    return _train(study, label, corpus, shape, begin, total, facts, init="random")


def _train(
    study: Study,
    name: str,
    corpus: Stage,
    shape: Shape,
    start: int,
    stop: int,
    facts: Mapping[str, Any],
    *,
    init: Literal["random", "pruned", "redrawn"],
    source: Stage | None = None,
) -> Stage:
    recipe = identity(study.recipe)
    if init == "pruned":  # nothing is drawn, so nothing of the drawing is identity
        recipe = {key: value for key, value in recipe.items() if key not in ("init_std", "seed")}
        recipe["peak_rate"] = study.retrain.peak_rate or study.recipe.peak_rate
    sizes = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name != "family"}
    return Stage(
        "train",
        name,
        {
            "init": init,
            "shape": None if init == "pruned" else identity(sizes),
            "slice": [start, stop],
            "recipe": recipe,
            "evaluation": identity(study.evaluation),
        },
        {"corpus": corpus} | ({"model": source} if source else {}),
        stop - start,
        train_flops(shape, stop - start, study.recipe.sequence),
        {"micro_batch": study.recipe.micro_batch},
        {**facts, "shape": shape},
    )


def _evaluate(study: Study, corpus: Stage, model: Stage) -> Stage:
    return Stage(
        "evaluate",
        model.name if model.kind == "train" else f"{model.name}/pruned",
        {"windows": study.evaluation.windows, "seqlen": study.recipe.sequence},
        {"corpus": corpus, "model": model},
        facts={"of": model.fingerprint},
    )
