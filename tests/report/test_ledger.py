"""Costs under three accounts, controls taken apart, objectives beside each other, LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from example import SCORING, P, R, broken, cell, example, judged, judged_text, large, pruned, t_interval

from secateur.comparison.ablation import controls, parts
from secateur.comparison.decision import decide
from secateur.comparison.index import Group, Index
from secateur.comparison.ledger import account_flops, best_runs, forwards, own_cost, pieces, setting_total
from secateur.comparison.objectives import objective_rows
from secateur.comparison.records import Cell, Cost, StudyResults, Sweep
from secateur.model.shapes import Shape, train_flops
from secateur.report.judgement import judge
from secateur.report.latex import comparisons_tex, escaped
from secateur.report.prose import part_sentence
from secateur.report.tables import cell_rows, comparison_rows, rows_csv

PARENT = example().parents[0]
PARENT_FLOPS = PARENT.cost.flops if PARENT.cost else math.nan


def study(*cells: Cell) -> StudyResults:
    return dataclasses.replace(example(), cells=cells, pruned=())


def test_accounts_add_the_parents_share_to_what_rests_on_it():
    p_r, s_r = cell("wanda", "P-R", 5.4), cell("wanda", "S_R", 5.6)
    dense = cell("minitron-depth", "S_R", 5.9)
    swept = dataclasses.replace(p_r, sweep=Cost(3 * R, 1e12, 60.0))
    index = Index(study(p_r, s_r, dense))
    own = p_r.training.flops + SCORING.flops
    assert account_flops(index, p_r, "sunk") == own
    assert account_flops(index, p_r, "shared") == own + PARENT_FLOPS / 3
    assert account_flops(index, p_r, "charged") == own + PARENT_FLOPS
    assert account_flops(index, swept, "sunk") == own + 1e12
    assert account_flops(index, s_r, "charged") == s_r.training.flops + SCORING.flops + PARENT_FLOPS  # has its mask
    assert {account_flops(index, dense, account) for account in ("sunk", "shared", "charged")} == {dense.training.flops}
    assert own_cost(swept) == Cost(R + SCORING.tokens + 3 * R, own + 1e12, 12.5 + 3.2 + 60.0)


def test_a_parents_sweep_is_charged_with_the_parent():
    p_r = cell("wanda", "P-R", 5.4)
    swept = dataclasses.replace(PARENT, sweep=Cost(2 * P, 6e11), children=3)
    index = Index(dataclasses.replace(study(p_r), parents=(swept,)))
    own = p_r.training.flops + SCORING.flops
    assert account_flops(index, p_r, "sunk") == own
    assert account_flops(index, p_r, "shared") == pytest.approx(own + PARENT_FLOPS / 3 + 2e11)
    assert account_flops(index, p_r, "charged") == own + PARENT_FLOPS + 6e11


def test_what_is_unknown_is_never_zero():
    public = dataclasses.replace(example(), parents=(dataclasses.replace(PARENT, cost=None),))
    index = Index(public)
    p_r = public.cells[0]
    assert account_flops(index, p_r, "sunk") == p_r.training.flops + SCORING.flops
    assert account_flops(index, p_r, "charged") is None and account_flops(index, p_r, "shared") is None
    assert setting_total(index, p_r) == (None, None)
    unscored = dataclasses.replace(p_r, pruning=None)
    assert own_cost(unscored) is None and account_flops(index, unscored, "sunk") is None
    unmeasured = dataclasses.replace(p_r, training=Cost(R, 1e12))
    own = own_cost(unmeasured)
    assert own and own.seconds is None


def test_the_settings_count_the_parent_for_the_pruned_path_alone():
    index = Index(example())
    for run in example().cells:
        tokens, flops = setting_total(index, run)
        pruned_path = run.name == "P-R"
        assert tokens == run.training.tokens + (P if pruned_path else 0)
        assert flops == pytest.approx(run.training.flops + (PARENT_FLOPS + SCORING.flops if pruned_path else 0))


def test_best_runs_are_those_that_a_naive_search_finds():
    index = Index(large())
    best = best_runs(index)
    for account in ("sunk", "shared", "charged"):
        flops = {key: account_flops(index, c, account) for key, c in index.cells.items() if c.evaluation}
        for group, name in flops:
            rivals = [
                (rival, rival_name)
                for rival, rival_name in flops
                if rival.target == group.target and rival.seed == group.seed and (rival, rival_name) != (group, name)
            ]
            beaten = any(
                flops[rival] <= flops[group, name] and _first_is_better(index, rival, (group, name)) for rival in rivals
            )
            assert (account in best.get((group, name), ())) != beaten


def _first_is_better(index: Index, first: tuple[Group, str], second: tuple[Group, str]) -> bool:
    gaps = []
    for seed in (0, 1):
        losses = [index.cells.get((dataclasses.replace(group, seed=seed), name)) for group, name in (first, second)]
        if all(c and c.evaluation for c in losses):
            one, two = (np.asarray(c.evaluation.windows) for c in losses if c and c.evaluation)
            gaps.append(two - one)
    return decide(gaps, range(len(gaps[0])), margin=None).verdict == "first"


def test_runs_between_which_nothing_is_decided_are_both_best():
    near = cell("wanda", "P-R", 5.400, salt=1), cell("wanda", "S_R", 5.405, salt=2)
    far = cell("wanda", "P-R", 5.400, salt=1), cell("wanda", "S_R", 5.6, salt=2)
    assert [{name for _, name in best_runs(Index(study(*runs)))} for runs in (near, far)] == [{"P-R", "S_R"}, {"P-R"}]
    dear = dataclasses.replace(far[1], training=Cost(R, 1e18))
    assert {name for _, name in best_runs(Index(study(far[0], dear)))} == {"P-R"}
    level = dataclasses.replace(near[1], training=Cost(R, 1e18))
    assert {name for _, name in best_runs(Index(study(near[0], level)))} == {"P-R", "S_R"}


def test_the_ranking_is_printed_for_larger_studies_alone():
    assert "Lowest losses" not in judged_text(example)
    text = judged_text(large)
    rows = [line for line in text.splitlines() if line.startswith(("P-R, ", "S_"))]
    losses = [float(line.split()[-4]) for line in rows if line.count("e+") == 3]
    assert len(losses) == 12 and losses == sorted(losses)


def test_forward_flops_are_those_of_the_shape_and_its_attention():
    sizes = {"hidden": 192, "ffn": 512, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32, "vocabulary": 2048}
    shape = Shape(**sizes)
    cost = Cost(P, train_flops(shape, P, 256))
    results = dataclasses.replace(large(), parents=(dataclasses.replace(PARENT, cost=cost),))
    row = forwards(Index(results))[0]
    assert row.flops == pytest.approx(shape.forward_flops(256))
    assert row.attention is not None
    assert row.flops - row.attention == pytest.approx(2 * (6 * shape.linear_parameters() + 2048 * 192))
    assert forwards(Index(example()))[0].attention is None  # its recipe does not say the sequence


def test_every_piece_of_work_is_in_the_ledger():
    fields = {"parent": "parent", "method": "wanda", "target": "0.5", "objective": "", "retrain_tokens": R, "seed": 0}
    trials = {"tokens": R, "whole": True, "rates": (1e-3, 1e-2), "losses": (5.4, 5.6), "rate": 1e-3, "at_edge": "low"}
    sweep = Sweep(name="P-R", cost=Cost(R, 1e12), stage="c0", **fields, **trials)
    shared = dataclasses.replace(sweep, retrain_tokens=2 * R)  # by the same trials, which count once
    whats = [row["what"] for row in pieces(Index(dataclasses.replace(example(), sweeps=(sweep, shared))))]
    assert whats.count("scoring") == 3 and whats.count("retraining") == 3 and whats.count("training from scratch") == 6
    assert whats[0] == "pretraining the parent" and whats.count("sweep of learning rates") == 1


def inherited(**losses: float) -> tuple[Index, Group]:
    """A sparse comparison with S_R at 5.6, P-R at 5.2 and controls of these losses."""
    cells = [cell("wanda", "P-R", 5.2, salt=1), cell("wanda", "S_R", 5.6, salt=2)]
    inits = {key.replace("_", "-"): loss for key, loss in losses.items()}
    cells += [cell("wanda", init, loss, salt=3 + i, init=init) for i, (init, loss) in enumerate(inits.items())]
    index = Index(study(*cells))
    return index, index.comparisons[0]


def test_controls_take_the_advantage_apart():
    index, group = inherited(random_mask=5.8, permuted=5.75, shuffled_weights=5.5, dense_twin=5.4, scratch=5.3)
    found = {(part.against, part.of): part for part in parts(index, group)}
    values = {pair: round(part.mean.value, 6) for pair, part in found.items() if part.mean}
    assert values == {
        ("random-mask", "redrawn"): 0.2,
        ("permuted", "redrawn"): 0.15,
        ("redrawn", "pruned"): 0.4,
        ("redrawn", "shuffled-weights"): 0.1,
        ("shuffled-weights", "pruned"): 0.3,
        ("dense-twin", "redrawn"): -0.2,
        ("scratch", "redrawn"): -0.3,
    }
    cells = {c.init: np.asarray(c.evaluation.windows) for c in index.results.cells if c.evaluation}
    mask = found["random-mask", "redrawn"].mean
    assert mask and (mask.low, mask.high) == pytest.approx(t_interval(cells["random-mask"] - cells["redrawn"]))
    assert part_sentence(found["random-mask", "redrawn"]).startswith(
        "The mask alone, beside a random one, saves 0.20 nats (95%"
    )
    assert part_sentence(found["dense-twin", "redrawn"]).startswith(
        "The sparse shape, beside a dense one with as many weights, costs"
    )
    assert [control.init for control in controls(index, group)][-1] == "pruned"


def test_embeddings_and_norms_of_the_parent_are_a_part_of_their_own():
    index, group = inherited(redrawn_linears=5.45, scratch=5.3)
    values = {(part.against, part.of): round(part.mean.value, 6) for part in parts(index, group) if part.mean}
    assert values == {
        ("redrawn", "pruned"): 0.4,
        ("redrawn", "redrawn-linears"): 0.15,
        ("redrawn-linears", "pruned"): 0.25,
        ("scratch", "redrawn"): -0.3,
    }
    assert part_sentence(parts(index, group)[1]).startswith("The parent's embeddings and norms save 0.15 nats")


def test_controls_of_a_dense_model_start_from_scratch():
    cells = [cell("minitron-depth", "P-R", 5.2, salt=1), cell("minitron-depth", "S_R", 5.6, salt=2)]
    cells.append(cell("minitron-depth", "shuffled-weights", 5.601, salt=3, init="shuffled-weights"))
    index = Index(study(*cells))
    texts = [part_sentence(part) for part in parts(index, index.comparisons[0])]
    assert texts[0].startswith("The weights save 0.40 nats")
    assert texts[1].startswith("The distribution of the weights alone makes no difference beyond 0.02 nats (")
    assert len(texts) == 3


def test_a_control_that_failed_or_had_other_tokens_is_no_part():
    index, group = inherited(permuted=5.75)
    failed = [dataclasses.replace(c, evaluation=None) if c.init == "permuted" else c for c in index.results.cells]
    (part, *_) = parts(Index(study(*failed)), group)
    assert part.mean is None and part_sentence(part) == "The mask alone, beside a permuted one: not measured."
    longer = [
        dataclasses.replace(c, training=Cost(2 * R, 1e12)) if c.path == "control" else c for c in index.results.cells
    ]
    assert parts(Index(study(*longer)), group) == ()
    assert parts(Index(example()), Index(example()).comparisons[0]) == ()


def test_objectives_are_compared_at_equal_tokens_and_at_equal_flops():
    plain = [
        cell("wanda", "P-R", loss, tokens=tokens, salt=i) for i, (tokens, loss) in enumerate(((R, 5.4), (2 * R, 5.2)))
    ]
    flops = plain[1].training.flops * 1.004
    better = cell("wanda", "P-R", 5.1, tokens=R, salt=5, objective="distillation", training_flops=flops)
    rows = objective_rows(Index(study(*plain, better)))
    assert [(row.equal, row.first.retrain_tokens, row.second.retrain_tokens) for row in rows] == [
        ("tokens", R, R),
        ("FLOPs", 2 * R, R),
    ]
    assert [round(row.mean.value, 6) for row in rows if row.mean] == [0.3, 0.1]
    assert rows[1].flop_ratio == pytest.approx(1.004)
    dear = dataclasses.replace(better, training=Cost(R, plain[1].training.flops * 1.02))
    assert [row.equal for row in objective_rows(Index(study(*plain, dear)))] == ["tokens"]
    failed = dataclasses.replace(better, evaluation=None)
    row = objective_rows(Index(study(*plain, failed)))[0]
    assert (row.mean, row.second_loss, row.first_loss) == (None, None, 5.4)
    assert objective_rows(Index(example())) == ()


def test_the_columns_of_cells_csv_that_others_read_stay_where_they_are(tmp_path: Path):
    rows = cell_rows(judged(large))
    head = rows_csv(rows).splitlines()[0].split(",")
    first = "name method granularity seed ratio ratio_total ratio_non_embedding parameters non_embedding train_tokens"
    then = "total_tokens train_flops total_flops loss perplexity sparsity difference low high winner"
    assert head[:20] == [*first.split(), *then.split()]
    assert {"parent", "target", "retrain_tokens", "objective", "init", "seconds", "peak_rate"} <= set(head)
    twins = [row for row in rows if row["name"] == "S_F" and row["seed"] == 1]
    assert twins and all(row["winner"] in ("pruned", "scratch") for row in twins)


def test_comparisons_are_written_pooled_and_by_seed():
    judgement = judged(large)
    rows = list(csv.DictReader(rows_csv(comparison_rows(judgement)).splitlines()))
    assert list(rows[0])[-1] == "seeds_vary" and {row["seeds_vary"] for row in rows} == {judgement.results.seeds_vary}
    assert len(rows) == len(judgement.verdicts) + len(judgement.by_seed)
    assert {(row["seed"], row["seeds"]) for row in rows} == {("", "2"), ("0", "1"), ("1", "1")}


def test_latex_is_escaped_and_says_what_is_missing():
    evil = "a_b & 100% \\x {~^} #1$"
    wrecked = tuple(dataclasses.replace(c, method=evil) if c.method == "wanda" else c for c in broken().cells)
    text = comparisons_tex(judge(dataclasses.replace(broken(), cells=wrecked)))
    assert evil not in text and escaped(evil) in text
    assert text.count("\\toprule") == text.count("\\end{tabular}") == 2
    assert "& -- & -- & -- & -- \\\\" in text
    assert "$S_{P+R}$" in text and "$-$0.280" in text
    assert escaped("a_b") == "a\\_b"


def test_a_pruned_model_without_cells_is_in_the_page_of_costs():
    results = dataclasses.replace(example(), cells=(), pruned=(pruned("wanda"),))
    assert [row["what"] for row in pieces(Index(results))] == ["pretraining the parent", "scoring"]


def test_a_part_that_is_a_comparison_of_the_study_has_its_verdict():
    """Among ten comparisons the gap is undecided; among the controls alone it would be a verdict."""
    controls_at = {"permuted": 5.9, "random-mask": 5.9}
    cells = [cell("wanda", "P-R", 5.4, salt=1), cell("wanda", "S_R", 5.4186, salt=2)]
    cells += [cell("wanda", init, loss, salt=3, init=init) for init, loss in controls_at.items()]
    for number in range(1, 10):
        cells += [cell("wanda", n, 5.4, salt=i, target=f"0.{number}5") for i, n in enumerate(("P-R", "S_R"))]
    judgement = judge(study(*cells))
    group = next(group for group in judgement.index.comparisons if group.target == "0.5")
    verdict = next(v for v in judgement.verdicts if v.group == group)
    part = next(part for part in judgement.parts(group) if (part.against, part.of) == ("redrawn", "pruned"))
    assert verdict.winner == "undecided" and part.mean == verdict.decision
    assert part_sentence(part).startswith("The weights under that mask: undecided (")
