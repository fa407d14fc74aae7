"""The two study files of arXiv:2606.14150, and the one for a single GPU, against the paper's values.

The values are those of the paper and of its authors' code, written here once more.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_plan import named

from secateur.comparison.records import StudyQuestion
from secateur.config import identity
from secateur.study.planner import stages_of, tokens_needed
from secateur.study.question import resolve_question
from secateur.study.resolve import resolve
from secateur.study.sections import MethodEntry
from secateur.study.spec import StudySpec, load_study
from secateur.study.stage import Stage, unique, with_inputs

STUDIES = Path(__file__).parents[2] / "studies"
BILLION = 4_194_304 * 250  # tokens that the paper counts as one billion: 4.0 M a step of 4,194,304
STEPS = {10: 2500, 30: 7500, 50: 12_500, 200: 50_000, 250: 62_500, 500: 125_000}
DEPTH, WIDTH, SPARSE = ("minitron-depth", "minitron-width", "sparsegpt")
EDGE = "@52.4288B"
#: hidden, FFN, layers, heads, KV heads; parameters in billions
SHAPES = {
    "4b-depth": ((4096, 14336, 16, 32, 8), 4.54),
    "3b-depth": ((4096, 14336, 8, 32, 8), 2.80),
    "2b-depth": ((4096, 14336, 4, 32, 8), 1.92),
    "1.5b-depth": ((4096, 14336, 2, 32, 8), 1.49),
    "4b-width": ((3072, 9216, 32, 32, 8), 4.51),
    "3b-width": ((2432, 6272, 32, 32, 8), 2.89),
    "2b-width": ((1792, 6016, 32, 32, 8), 2.08),
    "4b-shear": ((3456, 7808, 32, 32, 8), 4.61),
    "4b-flap": ((4096, 6528, 32, 20, 5), 4.46),
}
RECIPE = {
    "sequence": 8192,
    "tokens_per_step": 4_194_304,
    "peak_rate": 3e-4,
    "schedule": "cosine",
    "final_share": 0.1,
    "warmup": 0.05,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
    "seed": 0,
    "data_seed": 0,
    "attention": "window",
}


@cache
def study(name: str) -> StudySpec:
    return load_study(STUDIES / f"{name}.yaml")


@cache
def stages(name: str) -> list[Stage]:
    """The stages of a study; no network is needed, and the tests have none."""
    return unique(stages_of(study(name), resolve(study(name))))


def spans(name: str) -> dict[str, list[int]]:
    return {stage.name: stage.identity["slice"] for stage in stages(name) if stage.kind == "train"}


def entries(name: str, method: str) -> list[MethodEntry]:
    return [entry for entry in study(name).methods if entry.method == method]


def question(name: str) -> StudyQuestion:
    declared = study(name).question
    assert declared is not None
    return resolve_question(declared, stages(name))


# --- what both files share with the paper


@pytest.mark.parametrize("name", ["paper-llama31-8b", "paper-controlled"])
def test_parent_corpus_budgets_and_optimizer_are_the_papers(name: str) -> None:
    of = study(name)
    parent = next(iter(of.all_parents.values()))
    assert (parent.hidden, parent.ffn, parent.layers, parent.heads, parent.kv_heads) == (4096, 14336, 32, 32, 8)
    assert (parent.rope_theta, parent.rms_norm_eps, parent.rope_scaling) == (500_000, 1e-5, None)
    assert (parent.tied, parent.tokens, of.corpus.vocabulary) == (False, 200 * BILLION, 128_256)
    shape = parent.shape(of.corpus.vocabulary)
    assert shape is not None and shape.head_dim == 128 and shape.total / 1e9 == pytest.approx(8.03, abs=0.005)
    assert of.corpus.source == "hf:mlfoundations/dclm-baseline-1.0"
    assert of.corpus.tokenizer == "hf:meta-llama/Llama-3.1-8B"
    assert {key: getattr(of.recipe, key) for key in RECIPE} == RECIPE
    assert of.retrain.tokens == (50 * BILLION,)
    assert of.compute.dtype == "bfloat16"
    assert set(of.evaluation.measurements.texts) and len(of.evaluation.measurements.tasks) == 8
    assert {entry.method for entry in of.methods} == {DEPTH, WIDTH, SPARSE, "sheared", "flap"}


@pytest.mark.parametrize("name", ["paper-llama31-8b", "paper-controlled"])
def test_pruned_shapes_are_the_papers(name: str) -> None:
    pruned = {stage.facts["target"]: stage.facts["shape"] for stage in stages(name) if stage.kind == "prune"}
    sizes = {target: shape for target, shape in pruned.items() if target in SHAPES}
    assert sizes.keys() == SHAPES.keys() if name == "paper-llama31-8b" else len(sizes) == 4
    for target, shape in sizes.items():
        expected, billions = SHAPES[target]
        assert (shape.hidden, shape.ffn, shape.layers, shape.heads, shape.kv_heads) == expected, target
        assert shape.total / 1e9 == pytest.approx(billions, abs=0.006), target
        assert (shape.head_dim, shape.vocabulary) == (128, 128_256)
    assert {"0.5", "2:4"} <= pruned.keys()


@pytest.mark.parametrize("name", ["paper-llama31-8b", "paper-controlled"])
def test_gates_are_learned_on_as_many_tokens_as_in_the_paper(name: str) -> None:
    (learned,) = [stage for stage in stages(name) if stage.kind == "prune" and stage.name.startswith("sheared")]
    assert learned.tokens == 3200 * 32 * 4096 and learned.tokens / 1e9 == pytest.approx(0.42, abs=0.005)
    assert learned.identity["options"]["rate"] == 1e-4


# --- the authors' study


def test_the_authors_optimizer_and_first_weights() -> None:
    recipe = study("paper-llama31-8b").recipe
    assert (recipe.decay, recipe.mask, recipe.warmup_from) == ("all", "after-clip", "zero")
    assert (recipe.init.kind, recipe.init.std) == ("fan-in", 0.02)
    rates = {stage.identity["recipe"]["peak_rate"] for stage in stages("paper-llama31-8b") if stage.kind == "train"}
    assert rates == {3e-4}
    assert study("paper-llama31-8b").evaluation.protocol == "paper-train-split"
    assert study("paper-llama31-8b").evaluation.windows == 256


def test_the_authors_methods_and_the_text_of_their_scores() -> None:
    wikitext = {"source": "hf:Salesforce/wikitext:wikitext-103-v1", "windows": 1024, "seqlen": 8192, "seed": 42}
    c4 = {"source": "hf:allenai/c4:en", "protocol": "documents", "windows": 128, "seqlen": 8192, "seed": 0}
    flap = {"source": "hf:Salesforce/wikitext:wikitext-2-raw-v1", "windows": 2048, "seqlen": 128, "seed": 0}
    for method, expected in ((DEPTH, wikitext), (WIDTH, wikitext), (SPARSE, c4), ("flap", flap)):
        for entry in entries("paper-llama31-8b", method):
            assert identity(entry.calibration) == expected, method
    for entry in entries("paper-llama31-8b", WIDTH):
        assert entry.options == {"batch": "l2", "sequence": "l2"}
    sparse = [target for entry in entries("paper-llama31-8b", SPARSE) for target in entry.targets(())]
    assert sorted(sparse) == ["0.5", "0.6", "0.7", "0.8", "2:4"]


def test_the_authors_budgets_are_whole_steps() -> None:
    for billions, steps in STEPS.items():
        assert steps * 4_194_304 == billions * BILLION
    trained = {stage.name: stage.tokens for stage in stages("paper-llama31-8b") if stage.kind == "train"}
    assert trained["own"] == 200 * BILLION
    for label in ("minitron-depth-4b-depth", "minitron-width-4b-width"):
        ladder = [tokens for name, tokens in trained.items() if name.startswith(f"{label}/P-R@")]
        assert ladder == [n * BILLION for n in (10, 30, 50, 250, 500)]


def test_dense_twins_of_the_authors_start_at_the_first_token_and_sparse_ones_behind_the_parent() -> None:
    slices, parent = spans("paper-llama31-8b"), 200 * BILLION
    assert slices["own"] == [0, parent]
    assert slices[f"minitron-depth-4b-depth/P-R{EDGE}"] == [parent, parent + 50 * BILLION]
    assert slices[f"minitron-depth-4b-depth/S_R{EDGE}"] == [0, 50 * BILLION]
    for label in ("minitron-width-2b-width", "flap-4b-flap"):
        assert slices[f"{label}/S_R"] == [0, 50 * BILLION]
        assert slices[f"{label}/S_{{P+R}}"] == [0, 250 * BILLION]
    for label in ("sparsegpt-2of4", "sparsegpt-0.8"):
        assert slices[f"{label}/S_R"] == slices[f"{label}/P-R"] == [parent, parent + 50 * BILLION]
        assert named(stages("paper-llama31-8b"), f"{label}/S_R").identity["init"] == "redrawn-linears"
    # S250 is one run of the authors: the twin of R250 at equal training tokens and that of R50 at equal total tokens.
    runs = [s for s in stages("paper-llama31-8b") if s.kind == "train" and s.facts["shape"].layers == 16]
    assert sum(run.identity["slice"] == [0, 250 * BILLION] for run in runs) == 1
    assert tokens_needed(stages("paper-llama31-8b")) == 700 * BILLION  # more than the 260 B of their corpus


def test_equal_tokens_are_not_equal_compute() -> None:
    parent = named(stages("paper-llama31-8b"), "own")
    retrained = named(stages("paper-llama31-8b"), f"minitron-depth-4b-depth/P-R{EDGE}")
    (twin,) = [
        stage
        for stage in stages("paper-llama31-8b")
        if stage.kind == "train" and stage.facts["shape"].layers == 16 and stage.identity["slice"] == [0, 250 * BILLION]
    ]
    sizes = [stage.facts["shape"].total for stage in (parent, twin)]
    assert (sizes[0] * 200 + sizes[1] * 50) / (sizes[1] * 250) == pytest.approx(1.6, abs=0.02)

    def by_hand(layers: int, tokens: int) -> float:
        linears = layers * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
        return 3 * tokens * (2 * linears + 4 * layers * 32 * 128 * (8192 + 1) / 2)

    assert parent.flops == pytest.approx(by_hand(32, 200 * BILLION), rel=1e-9)
    assert twin.flops == pytest.approx(by_hand(16, 250 * BILLION), rel=1e-9)
    assert (parent.flops + retrained.flops) / twin.flops == pytest.approx(1.71, abs=0.01)


def test_runs_from_the_public_parent_read_what_those_of_the_own_parent_read() -> None:
    public = [stage for stage in stages("paper-llama31-8b") if stage.facts.get("parent") == "public"]
    runs = [stage for stage in public if stage.kind == "train"]
    assert {stage.facts["name"] for stage in runs} == {"P-R", "S_R"}  # no twin can match its parent's tokens
    assert all(stage.inputs["like"].kind == "fetch" for stage in runs if stage.facts["name"] == "S_R")
    slices = spans("paper-llama31-8b")
    for path in ("P-R", "S_R"):
        assert slices[f"minitron-depth-public-4b-depth/{path}"] == slices[f"minitron-depth-4b-depth/{path}{EDGE}"]


# --- the controlled one


def test_the_controlled_study_gives_both_paths_the_same_text() -> None:
    slices, parent = spans("paper-controlled"), 200 * BILLION
    for label in ("sparsegpt-0.5", "sparsegpt-2of4", "minitron-depth-4b-depth"):
        assert slices[f"{label}/P-R~s1"] == [parent, parent + 50 * BILLION]
        assert slices[f"{label}/S_{{P+R}}~s1"] == [0, 250 * BILLION]
        retrained = named(stages("paper-controlled"), f"{label}/P-R~s0", "select")
        twin = named(stages("paper-controlled"), f"{label}/S_R~s0", "select")
        trials: list[Any] = [next(iter(choice.facts["trials"].values())) for choice in (retrained, twin)]
        assert trials[0].identity["slice"] == trials[1].identity["slice"] == [parent, parent + 50 * BILLION]


def test_the_controlled_study_redraws_its_twins_and_has_the_authors_as_a_control() -> None:
    for label in ("sparsegpt-0.5", "sparsegpt-2of4"):
        assert named(stages("paper-controlled"), f"{label}/S_{{P+R}}~s2").identity["init"] == "redrawn"
        control = named(stages("paper-controlled"), f"{label}/redrawn-linears~s0", "select")
        assert next(iter(control.facts["trials"].values())).identity["init"] == "redrawn-linears"


@pytest.mark.parametrize("name", ["paper-controlled", "single-gpu", "regime", "regime-gpu"])
def test_every_run_has_a_swept_rate(name: str) -> None:
    sweep = study(name).sweep
    assert sweep is not None and sweep.parent_rates and len(sweep.rates) >= 3
    if name == "paper-controlled":
        assert {*sweep.rates, *sweep.parent_rates} <= {1e-5, 3e-5, 1e-4, 3e-4, 1e-3}  # the paper's
    for stage in stages(name):
        if stage.kind == "train" and stage.facts["path"] != "trial":
            assert stage.identity["recipe"]["peak_rate"] is None and stage.inputs["rate"].kind == "select", stage.name
    if name == "regime":  # every trial has the whole budget, so that the best one is the run
        assert sweep.tokens is None


@pytest.mark.parametrize("name", ["paper-controlled", "single-gpu", "regime", "regime-gpu"])
def test_what_decides_has_three_seeds_with_a_parent_each(name: str) -> None:
    declared = question(name)
    assert declared.margin == 0.02 and declared.content["comparisons"]
    assert all(comparison["seeds"] == [0, 1, 2] for comparison in declared.content["comparisons"])
    assert {comparison["twin"] for comparison in declared.content["comparisons"]} == {"S_{P+R}"}
    parents = [stage.name for stage in stages(name) if stage.facts.get("path") == "parent" or _is_choice(stage)]
    assert sorted(parents) == ["parent~s0", "parent~s1", "parent~s2"]


def _is_choice(stage: Stage) -> bool:
    """Whether a stage is a parent's best trial."""
    return stage.kind == "select" and stage.name == "parent~s0" and "path" in stage.facts


def test_every_file_asks_about_sparsegpt_and_minitron_depth_at_equal_total_tokens() -> None:
    decisive = {
        name: {(comparison.method, comparison.target) for comparison in question(name).comparisons}
        for name in ("paper-llama31-8b", "paper-controlled", "single-gpu", "regime", "regime-gpu")
    }
    assert decisive["paper-llama31-8b"] == {(SPARSE, "0.5"), (DEPTH, "4b-depth")}
    assert decisive["paper-controlled"] == {(SPARSE, "0.5"), (SPARSE, "2:4"), (DEPTH, "4b-depth")}
    assert decisive["single-gpu"] == {(SPARSE, "0.5"), (DEPTH, "0.5")}
    assert decisive["regime"] == decisive["regime-gpu"] == {(SPARSE, "0.5"), (SPARSE, "2:4"), (DEPTH, "0.5")}


# --- those in the paper's regime


@pytest.mark.parametrize(
    ("name", "tokens_per_parameter"), [("demo", 26), ("regime", 26), ("regime-gpu", 26), ("single-gpu", 26.1)]
)
def test_small_studies_are_in_the_papers_regime(name: str, tokens_per_parameter: float) -> None:
    of = study(name)
    assert of.parent is not None and of.parent.tokens is not None
    shape = of.parent.shape(of.corpus.vocabulary)
    assert shape is not None
    assert of.parent.tokens / shape.total == pytest.approx(tokens_per_parameter, abs=0.1)
    assert of.parent.tokens == pytest.approx(4 * of.retrain.tokens[-1], rel=1e-4)
    assert 1 - shape.non_embedding / shape.total < 0.17  # in the paper 0.13
    assert of.retrain.tokens[-1] % of.recipe.tokens_per_step == 0


def test_what_decides_in_the_regime_study_takes_less_than_half_of_its_compute() -> None:
    patterns = (
        "parent*",
        "minitron-depth-0.5/*1482752*",
        "sparsegpt-0.5/[PS]*1482752*",
        "sparsegpt-2of4/[PS]*1482752*",
    )
    first = unique(with_inputs(s for s in stages("regime") if any(fnmatchcase(s.name, p) for p in patterns)))
    names = {stage.name for stage in first}
    for seed in (0, 1, 2):
        for label in ("minitron-depth-0.5", "sparsegpt-0.5", "sparsegpt-2of4"):
            assert {f"{label}/{run}@1482752~s{seed}" for run in ("P-R", "S_R", "S_{P+R}")} <= names
    assert sum(stage.flops for stage in first) < 4 * 3600 * 2.0e10  # four core-hours at the speed of small models


def test_the_study_for_one_gpu_is_in_the_papers_regime_and_takes_a_day() -> None:
    of = study("single-gpu")
    assert of.parent is not None and of.parent.tokens is not None
    shape = of.parent.shape(of.corpus.vocabulary)
    assert shape is not None
    assert of.parent.tokens / shape.total == pytest.approx(26.1, abs=0.1)
    assert of.parent.tokens / shape.non_embedding == pytest.approx(30, abs=0.5)
    (retraining,) = of.retrain.tokens
    assert of.parent.tokens == 4 * retraining and retraining % of.recipe.tokens_per_step == 0
    day = 4e14 * 24 * 3600
    assert sum(stage.flops for stage in stages("single-gpu")) < day
    patterns = ("parent*", "minitron-depth-0.5/*P*", "sparsegpt-0.5/*P*")  # as in the file's header
    first = with_inputs(s for s in stages("single-gpu") if any(fnmatchcase(s.name, p) for p in patterns))
    assert sum(stage.flops for stage in unique(first)) < 0.65 * day
    names = {stage.name for stage in first}
    for seed in (0, 1, 2):
        for label in ("minitron-depth-0.5", "sparsegpt-0.5"):
            assert {f"{label}/P-R~s{seed}", f"{label}/S_{{P+R}}~s{seed}"} <= names
