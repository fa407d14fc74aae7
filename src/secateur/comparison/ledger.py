"""Costs of each run by itself, and with its parent under three accounts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from secateur.comparison.ablation import CONTINUED
from secateur.comparison.index import PRUNED, Group, Index, Model, group_of
from secateur.comparison.naming import group_name, model_name
from secateur.comparison.records import Cell, Cost
from secateur.comparison.sweeps import sweep_subject, unique_sweeps
from secateur.comparison.twins import SCRATCH, Paired, mean_difference, pair_cells
from secateur.formatting import TIMES, byte_size, count, plural

__all__ = [
    "ACCOUNTS",
    "FORMULA",
    "Account",
    "Forward",
    "account_flops",
    "best_runs",
    "forwards",
    "own_cost",
    "pieces",
    "pipelines",
    "rests_on_parent",
    "run_subject",
    "setting_total",
]

Account = Literal["sunk", "shared", "charged"]

#: How much of the parent's pretraining is added to what rests on it.
ACCOUNTS: dict[Account, str] = {
    "sunk": "the parent is there anyway: nothing",
    "shared": "P divided by the pruned models that the study makes of it",
    "charged": "P in full",
}

FORMULA = (
    "FLOPs of training = 3 x tokens x forward FLOPs per token (the backward pass costs two forward passes); a teacher "
    "adds its own forward FLOPs for each token, or has spent them before where its predictions were saved: each run "
    "that learns from those is charged for them in full. Block reconstruction costs 3 x the blocks' forward FLOPs, "
    "attention's once more, and a pass through the blocks of both models. Forward FLOPs per token = 2 x (weights of "
    "the blocks' linears + vocabulary x hidden, the head) + 4 x layers x heads x head_dim x (sequence + 1) / 2, the "
    "attention over the positions that a causal window sees on average. Norms, activations and the embedding's look-up "
    "are left out; "
    "zeroed weights count in full, since dense kernels multiply them. Of routed experts those count that a token is "
    "routed to."
).replace(" x ", f" {TIMES} ")

Row = dict[str, Any]


def rests_on_parent(cell: Cell) -> bool:
    """Whether a run could not be without the parent: it took over its weights, or a mask that was found on them."""
    return cell.path == "pruned" or cell.pruning is not None or cell.init == CONTINUED


def own_cost(cell: Cell) -> Cost | None:
    """Training, with the scoring, saved teacher and sweep that it rests on; None where the scoring is unknown."""
    if cell.path == "pruned" and cell.pruning is None:
        return None
    cost = cell.training
    for part in (cell.pruning, cell.teaching.cost if cell.teaching else None, cell.sweep):
        cost = cost + part if part else cost
    return cost


def account_flops(index: Index, cell: Cell, account: Account) -> float | None:
    """FLOPs of a run with what went before it; None where the parent's are needed and nobody knows them."""
    cost = own_cost(cell)
    if cost is None:
        return None
    if account == "sunk" or not rests_on_parent(cell):
        return cost.flops
    parent = index.parent(cell.parent, cell.seed)
    if parent is None or parent.cost is None:
        return None
    flops = parent.cost.flops + (parent.sweep.flops if parent.sweep else 0.0)
    return cost.flops + flops / (max(parent.children, 1) if account == "shared" else 1)


def setting_total(index: Index, cell: Cell) -> tuple[int | None, float | None]:
    """Tokens and FLOPs as the settings count them: with the parent and the pruning for what has its weights.

    The tokens are those of training: of the parent, of a pruning that trains, and of the run. A twin that keeps the
    parent's mask counts by its own run alone, as "from scratch" has it; the accounts above charge it for the mask.
    """
    if cell.init not in ("pruned", "shuffled-weights", CONTINUED):
        return cell.training.tokens, cell.training.flops
    parent = index.parent_cost(cell.parent)
    if parent and cell.init == CONTINUED:
        return parent.tokens + cell.training.tokens, (parent + cell.training).flops
    if parent is None or cell.pruning is None:
        return None, None
    pruned = index.pruned_model(group_of(cell).model, cell.seed)
    learned = pruned.training_tokens if pruned else 0
    return parent.tokens + learned + cell.training.tokens, (parent + cell.pruning + cell.training).flops


def best_runs(index: Index) -> dict[tuple[Group, str], tuple[Account, ...]]:
    """For each run, the accounts in which no run of the same target is decidedly better for as many FLOPs or fewer.

    Several runs may be best: those between which nothing is decided. A run counts with all its seeds. The decisions are
    not corrected for their number, which only makes more runs lose.
    """
    runs = _runs(index)
    accounts: dict[tuple[Group, str], tuple[Account, ...]] = {}
    decisions: dict[tuple[_Run, _Run], bool] = {}
    for account in ACCOUNTS:
        priced = [(flops, run) for run in runs if (flops := account_flops(index, run.cells[0], account)) is not None]
        for flops, run in priced:
            rivals = [
                rival for cost, rival in priced if cost <= flops and rival is not run and rival.target == run.target
            ]
            if not any(_beats(rival, run, decisions) for rival in rivals):
                for cell in run.cells:
                    key = (group_of(cell), cell.name)
                    accounts[key] = (*accounts.get(key, ()), account)
    return accounts


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of a comparison with all its seeds that have a held-out loss."""

    target: str
    cells: tuple[Cell, ...]


def _runs(index: Index) -> list[_Run]:
    by_run: dict[tuple[Group, str], list[Cell]] = {}
    for (group, name), cell in index.cells.items():
        if cell.evaluation and cell.init != CONTINUED:  # which has not the target's size
            by_run.setdefault((group.pooled, name), []).append(cell)
    return [_Run(cells[0].target, tuple(cells)) for cells in by_run.values()]


def _beats(rival: _Run, run: _Run, decisions: dict[tuple[_Run, _Run], bool]) -> bool:
    """Whether ``rival`` has a lower loss than ``run``, decided over the seeds that both have."""
    if (rival, run) not in decisions:
        by_seed = {cell.seed: cell for cell in run.cells}
        pairs = [pair_cells(cell, by_seed[cell.seed], "", "") for cell in rival.cells if cell.seed in by_seed]
        decision = mean_difference([pair for pair in pairs if isinstance(pair, Paired)], margin=None)
        sign = decision.sign if decision else 0
        decisions[rival, run], decisions[run, rival] = sign > 0, sign < 0
    return decisions[rival, run]


def run_subject(index: Index, cell: Cell) -> str:
    """The name of the comparison that a run belongs to; of a parent that was trained on, which serves many, its own."""
    if cell.init != CONTINUED:
        return group_name(group_of(cell), index.groups, target=True)
    notes = [f"R = {count(cell.retrain_tokens)}"] if len({group.retrain_tokens for group in index.groups}) > 1 else []
    notes += [f"seed {cell.seed}"] if index.several_seeds else []
    name = cell.parent if len(index.parents) > 1 else "the parent"
    return f"{name} ({', '.join(notes)})" if notes else name


def pieces(index: Index) -> list[Row]:
    """What each piece of work cost by itself."""
    several = len(index.parents) > 1
    rows: list[Row] = []
    for parent in index.results.parents:
        work = f"pretraining {parent.name}" if several else "pretraining the parent"
        rows.append({"what": work + _of_seed(parent.seed), "cost": parent.cost})
    for pruned in index.results.pruned:
        name = model_name(Model(pruned.parent, pruned.method, pruned.target), index.models)
        learning = "scoring, and tuning blocks" if pruned.tuned else "learning what to cut"
        work = learning if pruned.training_tokens else "scoring"
        rows.append({"what": work, "of": name + _of_seed(pruned.seed), "cost": pruned.cost})
    teachings = {cell.teaching.stage: cell.teaching for cell in index.results.cells if cell.teaching}
    for teaching in teachings.values():
        runs = sum(cell.teaching == teaching for cell in index.results.cells)
        size = f", {byte_size(teaching.size)} on disk" if teaching.size else ""
        subject = f"{teaching.parent}: the likeliest {teaching.top_k} ids{size}; shared by {plural(runs, 'run')}"
        rows.append({"what": "saving a teacher's predictions", "of": subject, "cost": teaching.cost})
    whats = {"pruned": "retraining", "scratch": "training from scratch", "control": "training a control"}
    shared: set[object] = set()
    for cell in index.results.cells:
        name = run_subject(index, cell)
        key = (name, cell.stages)
        if cell.init == CONTINUED and key in shared:
            continue
        shared.add(key)
        rows.append({"what": whats[cell.path], "name": cell.name, "of": name, "cost": cell.training})
    rows += [
        {"what": "sweep of learning rates", "name": sweep.name, "of": sweep_subject(index, sweep), "cost": sweep.cost}
        for sweep in unique_sweeps(index)
    ]
    return rows


def _of_seed(seed: int | None) -> str:
    return "" if seed is None else f" (seed {seed})"


def pipelines(index: Index) -> list[Row]:
    """What the two paths cost in all at equal total tokens, side by side; empty where that is not a setting."""
    rows = []
    for group in index.comparisons:
        first = index.pools[group.pooled][0]
        pruned, scratch = index.cell(first, PRUNED), index.cell(first, SCRATCH["total"])
        pruned_total, scratch_total = (
            setting_total(index, cell) if cell else (None, None) for cell in (pruned, scratch)
        )
        if scratch:
            rows.append(
                {
                    "group": group_name(group, index.comparisons, target=True),
                    "pruned_tokens": pruned_total[0],
                    "pruned_flops": pruned_total[1],
                    "scratch_tokens": scratch_total[0],
                    "scratch_flops": scratch_total[1],
                    "ratio": pruned_total[1] / scratch_total[1] if pruned_total[1] and scratch_total[1] else None,
                }
            )
    return rows


@dataclass(frozen=True)
class Forward:
    """What one token costs an architecture forwards."""

    name: str
    flops: float
    attention: float | None  #: the part of it that is attention; None where the sequence is not recorded


def forwards(index: Index) -> list[Forward]:
    """Forward FLOPs per token of each parent and pruned architecture, from what the runs recorded."""
    sequence = index.results.recipe.get("sequence")
    rows = []
    for parent in index.parents.values():
        if parent.cost and parent.cost.tokens:
            name = "parent" if len(index.parents) == 1 else parent.name
            rows.append(_forward(name, parent.cost, parent.shape, sequence))
    trained: dict[Model, Cost] = {}
    for cell in index.results.cells:
        if cell.path == "pruned" and not cell.objective and cell.training.tokens:  # a teacher would count as well
            trained.setdefault(group_of(cell).model, cell.training)
    for model, cost in trained.items():
        if model in index.pruned:
            rows.append(_forward(model_name(model, index.models), cost, index.pruned[model].shape, sequence))
    return rows


def _forward(name: str, cost: Cost, shape: dict[str, Any], sequence: int | None) -> Forward:
    keys = ("layers", "heads", "head_dim")
    attention = None
    if sequence and all(key in shape for key in keys):
        attention = 4.0 * math.prod(shape[key] for key in keys) * (sequence + 1) / 2
    return Forward(name, cost.flops / cost.tokens / 3, attention)
