"""From a study file to its stages: what is planned, what it costs, what is shared, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.study.plan import plan_study
from secateur.study.planner import stages_of, tokens_needed, trunk_savings
from secateur.study.resolve import ResolvedParent, ResolvedStudy, resolve
from secateur.study.spec import StudySpec, load_study
from secateur.study.stage import Stage, unique

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


def study(folder: Path, **changes: Any) -> StudySpec:
    raw: dict[str, Any] = {
        "name": "micro",
        "corpus": {"vocabulary": 280},
        "parent": {"tokens": "16k", "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2},
        "methods": ["minitron-depth"],
        "ratios": 0.5,
        "retrain": {"tokens": 4096, "peak_rate": 2e-3},
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3},
    }
    path = folder / "micro.yaml"
    path.write_text(dump_yaml(raw | changes), encoding="utf-8")
    return load_study(path)


def planned(of: StudySpec) -> list[Stage]:
    parents = {name: ResolvedParent(p.shape(of.corpus.vocabulary)) for name, p in of.all_parents.items()}  # type: ignore[arg-type]
    return unique(stages_of(of, ResolvedStudy("text", parents)))


def named(stages: list[Stage], name: str, kind: str = "train") -> Stage:
    (found,) = [stage for stage in stages if stage.name == name and stage.kind == kind]
    return found


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "plan", str(path)]) == 0
    assert "Nothing has been run." in capsys.readouterr().out


def test_a_corpus_is_known_by_what_it_holds_and_not_by_its_place(tmp_path: Path) -> None:
    def prints(folder: str, text: str) -> set[str]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text, encoding="utf-8")
        found = study(tmp_path, corpus={"source": f"text:{tmp_path / folder}", "vocabulary": 280})
        return {stage.fingerprint for stage in unique(stages_of(found, resolve(found)))}

    here = prints("here", "one")
    assert prints("there", "one") == here
    assert not prints("other", "another") & here


def test_settings_equal_tokens_or_flops(tmp_path: Path) -> None:
    settings = ["equal_training_tokens", "equal_total_tokens", "equal_training_flops", "equal_total_flops"]
    stages = planned(study(tmp_path, settings=settings))
    parent, pruned = named(stages, "parent"), named(stages, "minitron-depth-0.5", "prune")
    run = named(stages, "minitron-depth-0.5/P-R")
    assert named(stages, "minitron-depth-0.5/S_R").identity["slice"] == [16_000, 20_096]
    assert named(stages, "minitron-depth-0.5/S_{P+R}").identity["slice"] == [0, 20_096]
    window = run.flops / 4096 * 32
    alone = named(stages, "minitron-depth-0.5/S_F")
    assert alone.flops == pytest.approx(run.flops + pruned.flops, abs=window)
    whole = named(stages, "minitron-depth-0.5/S_{P+F}")
    assert whole.flops == pytest.approx(parent.flops + pruned.flops + run.flops, abs=window)
    assert whole.tokens > named(stages, "minitron-depth-0.5/S_{P+R}").tokens  # the parent's tokens are dearer
    assert tokens_needed(stages) == whole.tokens


def test_a_ladder_has_runs_of_its_own_unless_it_shares_its_trunk(tmp_path: Path) -> None:
    budgets = [2048, 4096, 8192]
    own = planned(study(tmp_path, retrain={"tokens": budgets}, settings="equal_training_tokens"))
    assert trunk_savings(own) == (16_000 + 2 * sum(budgets),) * 2
    recipe = {"sequence": 32, "tokens_per_step": 64, "schedule": "wsd", "decay": 0.25}
    shared = planned(
        study(
            tmp_path,
            retrain={"tokens": budgets, "trunk": "shared"},
            settings="equal_training_tokens",
            recipe=recipe,
        )
    )
    last = named(shared, "minitron-depth-0.5/P-R@8.192k")
    trunks = last.facts["before"]
    assert [t.identity["slice"] for t in trunks] == [[16_000, 17_536], [17_536, 19_072], [19_072, 22_144]]
    assert last.identity["slice"] == [22_144, 24_192] and last.facts["cost"][0] == 8192
    assert trunks[0].identity["init"] == "pruned" and trunks[1].inputs["model"] is trunks[0]
    first = named(shared, "minitron-depth-0.5/P-R@2.048k")
    assert first.inputs["model"].fingerprint == trunks[0].fingerprint
    assert trunk_savings(shared) == (16_000 + 2 * (6144 + 3 * 0 + 512 + 1024 + 2048), 16_000 + 2 * sum(budgets))


def test_a_teacher_is_charged_and_equal_flops_mean_fewer_tokens(tmp_path: Path) -> None:
    objectives = ["language-model", {"kind": "distill"}, {"kind": "distill", "name": "kd-flops", "equal": "flops"}]
    stages = planned(study(tmp_path, retrain={"tokens": 4096, "objective": objectives}, settings=[]))
    plain, taught, short = (named(stages, f"minitron-depth-0.5/P-R{tag}") for tag in ("", "+distill", "+kd-flops"))
    parent = taught.inputs["teacher"]
    assert taught.flops - plain.flops == pytest.approx(4096 * parent.facts["shape"].forward_flops(32))
    assert short.tokens < plain.tokens and short.flops == pytest.approx(plain.flops, rel=0.02)


def test_controls_are_of_what_they_can_differ_in(tmp_path: Path) -> None:
    controls = ["scratch", "redrawn", "permuted", "random-mask", "shuffled-weights", "dense-twin"]
    methods = ["minitron-depth", {"method": "sparsegpt", "pattern": "2:4"}]
    stages = planned(study(tmp_path, methods=methods, controls=controls, settings="equal_training_tokens"))
    found = {stage.name: stage for stage in stages if stage.facts.get("path") == "control"}
    sparse = {name.partition("/")[2] for name in found if name.startswith("sparsegpt")}
    assert sparse == set(controls) - {"redrawn"}  # which is the twin S_R
    assert {name for name in found if name.startswith("minitron")} == {"minitron-depth-0.5/shuffled-weights"}
    twin = named(stages, "sparsegpt-2of4/S_R")
    assert twin.identity["init"] == "redrawn" and twin.inputs["plan"].kind == "prune"
    kept = twin.facts["shape"].non_embedding - twin.facts["shape"].block_weights // 2
    assert found["sparsegpt-2of4/dense-twin"].facts["shape"].non_embedding == pytest.approx(kept, rel=0.05)
    assert found["sparsegpt-2of4/scratch"].facts["shape"] == named(stages, "parent").facts["shape"]


def test_seeds_budgets_and_exclusions_multiply(tmp_path: Path) -> None:
    stages = planned(
        study(
            tmp_path,
            methods=["minitron-depth", {"method": "wanda", "seeds": 3, "tokens": 2048, "settings": []}],
            seeds=[0, 1],
            retrain={"tokens": [2048, 4096]},
            settings=["equal_training_tokens", {"kind": "equal_total_tokens", "tokens": 4096}],
            exclude=[
                {"seed": 1, "tokens": 2048},
                {"method": "minitron-depth", "seed": 1, "setting": "equal_total_tokens"},
            ],
        )
    )
    runs = sorted(stage.name for stage in stages if stage.kind == "train")
    assert runs == [
        "minitron-depth-0.5/P-R@2.048k~s0",
        "minitron-depth-0.5/P-R@4.096k~s0",
        "minitron-depth-0.5/P-R@4.096k~s1",
        "minitron-depth-0.5/S_R@2.048k~s0",
        "minitron-depth-0.5/S_R@4.096k~s0",
        "minitron-depth-0.5/S_R@4.096k~s1",
        "minitron-depth-0.5/S_{P+R}@4.096k~s0",
        "parent~s0",
        "parent~s1",
        "parent~s3",
        "wanda-0.5/P-R",
    ]
    second = named(stages, "minitron-depth-0.5/S_R@4.096k~s1").identity["recipe"]
    assert (second["seed"], second["data_seed"]) == (1, 1)


def test_equal_shapes_share_their_twins(tmp_path: Path) -> None:
    stages = planned(study(tmp_path, ratios=[0.5, 0.52]))
    assert sum(stage.facts.get("name") == "S_R" for stage in stages) == 1
    assert sum(stage.kind == "prune" for stage in stages) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parent": {"tokens": "1k", "hidden": 16}}, "parent.ffn: this key is required"),
        ({"parents": {"a": {}}}, "parent.hidden: this key is required, unless parent.checkpoint names a model"),
        ({"parent": None}, "parent: this key is required"),
        ({"methods": [{"method": "minitron-depth", "parent": "other"}]}, "methods[0].parent: 'other' is not a parent"),
        ({"methods": ["wanda", {"method": "wanda", "ratios": [0.5]}]}, "an entry appears twice: wanda at 0.5"),
        (
            {"methods": [{"method": "wanda", "ratios": 0.5, "pattern": "2:4"}]},
            "both say how much to remove; make two entries of them",
        ),
        ({"methods": [{"method": "flap", "shapes": {"x": "layers=2"}}]}, "flap at x): shape: "),
        (
            {"methods": [{"method": "sheared", "options": {"stepz": 3}}]},
            "methods[0].options: sheared has no option 'stepz'",
        ),
        ({"ratios": []}, "ratios: this key is required"),
        ({"retrain": {"tokens": [5, 5]}}, "retrain.tokens: an entry appears twice: 5"),
        ({"retrain": {"tokens": 5, "trunk": "shared"}}, "recipe.schedule wsd"),
        ({"settings": ["equal_tokens"]}, "settings[0].kind: 'equal_tokens' is not known"),
        ({"controls": ["redraw"]}, "controls[0].init: 'redraw' is not known; did you mean 'redrawn'?"),
        ({"exclude": [{}]}, "exclude: an entry needs at least one key"),
        ({"sweep": {"rates": [1e-3]}}, "sweep.rates"),
        ({"calibration": {"windows": 10_000}}, "calibration.windows: 10,000 windows"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(study(tmp_path, **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: plain\ncorpus: {vocabulary: 280}\n"
        "parent: {tokens: 16k, hidden: 16, ffn: 48, layers: 4, heads: 4, kv_heads: 2}\n"
        "methods:\n  - {method: wanda, pattern: 2:4}\nretrain: {tokens: 1_024}\n"
        "calibration: {windows: 8}\nrecipe: {sequence: 32, tokens_per_step: 64}\n"
    )
    (pruned,) = [stage for stage in planned(load_study(path)) if stage.kind == "prune"]
    assert pruned.identity["target"]["pattern"] == "2:4"


@pytest.mark.parametrize("name", ["hf:someone/something", "someone/something@main"])
def test_a_checkpoint_of_the_hub_is_planned_without_a_network(tmp_path: Path, name: str) -> None:
    sizes = {"hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 280}
    of = study(tmp_path, parent={"checkpoint": name, **sizes}, settings="equal_training_tokens")
    stages = unique(stages_of(of, resolve(of)))
    fetched = named(stages, "parent", "fetch")
    assert fetched.identity["checkpoint"] == name
    assert named(stages, "minitron-depth-0.5/P-R").identity["slice"] == [256, 4352]  # behind what is scored on
    assert stages[0].identity["tokenizer"] == name
    with pytest.raises(UserError, match="give the sizes"):
        resolve(study(tmp_path, parent={"checkpoint": name}))
    with pytest.raises(UserError, match="needs a parent that the study pretrains"):
        of = study(tmp_path, parent={"checkpoint": name, **sizes})
        stages_of(of, resolve(of))


def test_each_seed_has_its_own_parent_and_pruning_unless_seeds_vary_training_alone(tmp_path: Path) -> None:
    common: dict[str, Any] = {"methods": ["wanda", "random-depth"], "controls": "permuted"}
    common["retrain"] = {"tokens": 4096, "objective": [{"kind": "distill", "settings": []}, "language-model"]}
    single = planned(study(tmp_path, **common))
    every = planned(study(tmp_path, **common, seeds=[0, 1]))
    assert {s.fingerprint for s in single} < {s.fingerprint for s in every}  # the recipe's own seed changes nothing
    parent, pruned = named(every, "parent~s1"), named(every, "wanda-0.5~s1", "prune")
    recipe = named(single, "parent").identity["recipe"]
    assert parent.identity["recipe"] == {**recipe, "seed": 1, "data_seed": 1}
    assert pruned.inputs["model"] is parent
    windows = [named(every, f"wanda-0.5~s{seed}", "prune").identity["calibration"]["seed"] for seed in (0, 1)]
    draws = [named(every, f"random-depth-0.5~s{seed}", "prune").identity["options"]["seed"] for seed in (0, 1)]
    assert windows[0] == 42 != windows[1] and draws[0] == 42 != draws[1]
    for name in ("P-R", "S_R", "permuted"):  # all that rests on a pruning rests on that of its seed
        run = named(every, f"wanda-0.5/{name}~s1")
        assert run.inputs["model" if name == "P-R" else "plan"] is pruned
    assert named(every, "wanda-0.5/P-R+distill~s1").inputs["teacher"] is parent
    shared = planned(study(tmp_path, **common, seeds={"values": [0, 1], "vary": "training"}))
    assert {s.fingerprint for s in single} < {s.fingerprint for s in shared}
    assert [s.name for s in shared if s.kind == "prune"] == ["wanda-0.5", "random-depth-0.5"]
    assert named(shared, "wanda-0.5/P-R~s1").inputs["model"] is named(shared, "wanda-0.5", "prune")
    lone = planned(study(tmp_path, **common, seeds=1))  # one seed has nothing to vary
    assert named(lone, "parent").fingerprint == named(single, "parent").fingerprint


def test_only_parents_and_prunings_with_a_cell_are_planned(tmp_path: Path) -> None:
    methods = ["minitron-depth", {"method": "wanda", "seeds": [0, 2]}]
    of = study(tmp_path, methods=methods, ratios=[0.5, 0.25], seeds=[0, 1], exclude=[{"seed": 2, "target": 0.25}])
    stages = planned(of)
    assert [s.name for s in stages if s.facts.get("path") == "parent"] == ["parent~s0", "parent~s1", "parent~s2"]
    wanda = [s.name for s in stages if s.kind == "prune" and s.name.startswith("wanda")]
    assert wanda == ["wanda-0.5~s0", "wanda-0.5~s2", "wanda-0.25~s0"]
    fewer = planned(study(tmp_path, methods=methods, seeds=[0, 1], exclude=[{"seed": [1, 2]}]))
    assert [s.name for s in fewer if s.facts.get("path") == "parent"] == ["parent~s0"]


def test_a_checkpoint_is_shared_by_all_seeds(tmp_path: Path) -> None:
    sizes = {"hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 280}
    methods = ["wanda", "magnitude", "random-weight"]
    parent = {"checkpoint": "hf:a/b", **sizes}
    of = study(tmp_path, parent=parent, methods=methods, settings="equal_training_tokens", seeds=[0, 1])
    stages = unique(stages_of(of, resolve(of)))
    assert [s.name for s in stages if s.kind == "fetch"] == ["parent"]
    prunings = [s.name for s in stages if s.kind == "prune"]  # magnitudes of one model are the same for all seeds
    assert prunings == ["wanda-0.5~s0", "wanda-0.5~s1", "magnitude-0.5", "random-weight-0.5~s0", "random-weight-0.5~s1"]


def test_twins_of_a_learned_method_train_on_its_tokens_as_well(tmp_path: Path) -> None:
    sheared = {"method": "sheared", "axes": "layers", "options": {"steps": 10, "windows": 4}}
    settings = ["equal_training_tokens", "equal_total_tokens", "equal_training_flops"]
    controls = ["shuffled-weights", "without-pruning-tokens"]
    stages = planned(study(tmp_path, methods=["minitron-depth", sheared], settings=settings, controls=controls))
    spans = {s.name: tuple(s.identity["slice"]) for s in stages if "slice" in s.identity}
    learned = 10 * 4 * 32
    retraining = 16_000 + learned
    assert spans["sheared-0.5"] == (16_000, retraining)  # behind the parent's P
    assert spans["sheared-0.5/P-R"] == (retraining, retraining + 4096)
    assert spans["sheared-0.5/S_R"] == (16_000, retraining + 4096)
    assert spans["sheared-0.5/S_{P+R}"] == (0, retraining + 4096)
    assert spans["sheared-0.5/shuffled-weights"] == spans["sheared-0.5/P-R"]
    assert spans["sheared-0.5/without-pruning-tokens"] == spans["sheared-0.5/P-R"]
    assert spans["minitron-depth-0.5"] == (0, 16_000) and spans["minitron-depth-0.5/P-R"] == (16_000, 20_096)
    assert "minitron-depth-0.5/without-pruning-tokens" not in spans  # it would be the twin itself
    control, twin = (named(stages, f"sheared-0.5/{name}") for name in ("without-pruning-tokens", "S_R"))
    assert control.identity["init"] == "scratch" and control.identity["shape"] == twin.identity["shape"]
    run, pruned = named(stages, "sheared-0.5/P-R"), named(stages, "sheared-0.5", "prune")
    assert pruned.tokens == learned and pruned.facts["training_tokens"] == learned
    equal = named(stages, "sheared-0.5/S_F")
    assert equal.flops == pytest.approx(run.flops + pruned.flops, rel=0.01) and equal.identity["slice"][0] == 16_000


def test_a_learned_method_reads_the_tokens_before_retraining_of_a_checkpoint_too(tmp_path: Path) -> None:
    sizes = {"hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 280}
    sheared = {"method": "sheared", "axes": "layers", "options": {"steps": 10, "windows": 4}}
    parent = {"checkpoint": "hf:a/b", **sizes}
    of = study(tmp_path, parent=parent, methods=["wanda", sheared], settings="equal_training_tokens")
    spans = {s.name: s.identity["slice"] for s in stages_of(of, resolve(of)) if "slice" in s.identity}
    assert spans["sheared-0.5"] == [0, 1280] and spans["sheared-0.5/S_R"] == [0, 5376]
    assert spans["sheared-0.5/P-R"] == spans["wanda-0.5/P-R"] == [1280, 5376]


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([0, 1], "Seeds 0 and 1 vary the order of the data, fresh weights, the parent and its pruning."),
        (
            {"values": [0, 1], "vary": "training"},
            "Seeds 0 and 1 vary the order of the data and fresh weights; all seeds share one parent and one pruning.",
        ),
        (0, None),
    ],
)
def test_the_plan_says_what_seeds_vary_and_what_pruning_trains_on(
    tmp_path: Path, seeds: Any, expected: str | None
) -> None:
    sheared = {"method": "sheared", "axes": "layers", "options": {"steps": 10, "windows": 4}}
    text = str(plan_study("micro", planned(study(tmp_path, methods=["wanda", sheared], seeds=seeds))))
    assert "sheared trains on L = 1,280 tokens while it prunes" in text and "wanda trains on" not in text
    assert expected in text if expected else "Seeds" not in text
