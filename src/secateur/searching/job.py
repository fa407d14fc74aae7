"""Run a search: score once, cut every candidate, train rung after rung, measure the finalists, rank them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from secateur.calibration.journal import Workspace
from secateur.comparison.decision import adjust
from secateur.comparison.items import compare_results, decision_record
from secateur.config import fingerprint, identity
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.evaluation import job as evaluation
from secateur.evaluation.request import EvaluateRequest
from secateur.evaluation.results import LOSS
from secateur.evaluation.token_windows import open_shards
from secateur.files import check_disk, read_json, require_new_directory, resumable_directory, sync_tree, write_json
from secateur.formatting import count, plural, scientific
from secateur.hub import local_checkpoint, repository_of
from secateur.model.card import Ancestry
from secateur.model.checkpoint import Checkpoint
from secateur.model.frontier import Candidate, frontier
from secateur.model.shapes import teacher_flops, train_flops
from secateur.progress import notify
from secateur.pruning.calibration import Calibration, read_calibration
from secateur.pruning.cost import scoring_flops
from secateur.pruning.default_axes import with_default_axes
from secateur.pruning.goals import goal_spaces
from secateur.pruning.pipeline import scores_identity, write_pruned
from secateur.pruning.pruner import Pruner
from secateur.pruning.target import Target
from secateur.runtime import environment, pick_device, pick_dtype
from secateur.searching.request import SearchRequest
from secateur.searching.rungs import Rung, plan_rungs
from secateur.training import job as training
from secateur.training.teacher_logits import open_logits

__all__ = ["SearchResult", "search"]


@dataclass(frozen=True)
class SearchResult:
    """The finalists of a search. ``os.fspath`` gives the directory of the best, which serves wherever a path does."""

    path: Path
    content: dict[str, Any]  #: of ``search.json``

    def __fspath__(self) -> str:
        return str(self.path / "1")

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur search --json`` prints them."""
        return {"out": str(self.path), **self.content}


@dataclass(frozen=True)
class _Entry:
    """A candidate with its place in the frontier."""

    name: str
    candidate: Candidate
    target: Target
    cost: float  #: FLOPs of a token of training


@dataclass(frozen=True)
class _Plan:
    """What a search will do, known before anything is computed."""

    pruner: Pruner
    entries: list[_Entry]
    rungs: list[Rung]
    scorings: int  #: passes over the calibration text
    scoring: float  #: FLOPs of these

    @property
    def flops(self) -> float:
        return self.scoring + sum(rung.models * rung.flops for rung in self.rungs)

    def announce(self, request: SearchRequest) -> None:
        """Print the frontier and the cost."""
        notify(f"goal: {request.goal.description}; {plural(len(self.entries), 'legal shape')}")
        for entry in self.entries:
            notify(f"  {entry.name}  {entry.candidate.axes}: {count(entry.candidate.shape.total)} parameters")
        notify(f"cost: scoring, {plural(self.scorings, 'pass', 'passes')}: {scientific(self.scoring)} FLOPs")
        for number, rung in enumerate(self.rungs, start=1):
            notify(f"cost: rung {number}: {rung}")
        tokens = sum(rung.most_tokens for rung in self.rungs)
        notify(
            f"cost: {count(tokens)} tokens at most and {scientific(self.flops)} FLOPs in all; measuring is not counted"
        )


def search(request: SearchRequest) -> SearchResult:
    """Run a search and write the finalists, best first, to ``out/1``, ``out/2`` ... beside ``out/search.json``.

    What can fail without reading weights fails first. An interrupted search resumes with the same request.

    Raises:
        UserError: if the model, the data and the request do not fit together.
        RunError: if a training broke or was stopped; what is finished stays.
    """
    out, device = Path(request.out), pick_device(request.device)
    checkpoint = Checkpoint(local_checkpoint(request.model))
    require_new_directory(out)
    store = _open_data(request, checkpoint)
    plan = _plan(request, checkpoint, store, device)
    saves = sum(entry.candidate.shape.total for entry in plan.entries) / checkpoint.shape.total
    saves += sum(rung.models for rung in plan.rungs)
    plan.announce(request)
    notify(f"estimate: {check_disk(out, saves * checkpoint.stored_bytes)}")
    calibration = plan.pruner.calibration
    run_identity = {
        "model": checkpoint.digest,
        "method": request.method,
        "shapes": [dict(entry.target.sizes) for entry in plan.entries],
        "rungs": [rung.record() for rung in plan.rungs],
        "calibration": calibration.record() if calibration else None,
        "data": [store.fingerprint, request.skip, request.heldout_windows],
        "recipe": identity(request.recipe),
        "teacher": str(request.teacher) if request.teacher else None,
        "execution": [device, request.dtype, request.batch],
        "versions": environment(),
    }
    with resumable_directory(out, run_identity, resume=True, progress_files="**/finished") as (fresh, work):
        models = _cut(request, plan, work)
        rungs, survivors = [], plan.entries
        for number, rung in enumerate(plan.rungs, start=1):
            results = [_train(request, plan, rung, entry, models, work / f"rung-{number}") for entry in survivors]
            results.sort(key=lambda result: result["loss"])
            rungs.append({**rung.record(), "results": results})
            following = plan.rungs[number].models if number < len(plan.rungs) else rung.models
            places = {result["shape"]: place for place, result in enumerate(results[:following])}
            survivors = sorted((e for e in survivors if e.name in places), key=lambda e: places[e.name])
        finalists = _measure(request, survivors, work / f"rung-{len(plan.rungs)}")
        content = _record(request, plan, rungs, finalists)
        for place, finalist in enumerate(finalists, start=1):
            source = work / f"rung-{len(plan.rungs)}" / finalist["shape"]
            shutil.copytree(source, fresh / str(place), copy_function=os.link)
            (fresh / str(place) / "metrics.jsonl").unlink(missing_ok=True)  # it has times
        write_json(fresh / "search.json", content)
    return SearchResult(out, content)


def _open_data(request: SearchRequest, checkpoint: Checkpoint) -> TokenStore:
    store = open_shards(request.data, "data")
    if "heldout" not in store.manifest.splits:
        raise UserError(
            f"`data`: {request.data} has no held-out documents to rank by; build it with a `holdout` above 0"
        )
    return store


def _plan(request: SearchRequest, checkpoint: Checkpoint, store: TokenStore, device: str) -> _Plan:
    """Find the candidates, and what each rung trains them on.

    Raises:
        UserError: if no two shapes reach the goal, or the budget or the data are too small.
    """
    pruning, before = request.pruning, checkpoint.shape
    method, name = pruning.prototype, request.method
    target = with_default_axes(pruning.targets[0], before, method, name)
    target.check_family(before, method, name)
    spaces = goal_spaces(target, method)
    candidates = frontier(before, request.goal, spaces, step=request.step, several=request.candidates)
    if len(candidates) < 2:
        raise UserError(
            f"`{request.goal.kind}`: {name} reaches it by one shape alone; use `secateur prune`, or more `axes`"
        )
    if len(candidates) < request.candidates:
        notify(
            f"`candidates`: {len(candidates)} instead of {request.candidates}, since there are no more unlike shapes"
        )
    logits = open_logits(request.teacher)
    teacher = Checkpoint(local_checkpoint(request.teacher)).shape if request.teacher and not logits else None
    length, entries = request.recipe.sequence, []
    for number, candidate in enumerate(candidates, start=1):
        # all spaces are named, those that keep their size as well: scores are shared by the spaces' names
        sizes = {"kv_heads" if space == "kv" else space: candidate.shape.units(space) for space in spaces}
        sized = dataclasses.replace(target, sizes=sizes, axes=())
        sized.shape(before, method, name)  # refuses what cannot be opened
        cost = train_flops(candidate.shape, length, length) + (
            teacher_flops(teacher, length, length) if teacher else 0.0
        )
        entries.append(_Entry(f"shape-{number:02}", candidate, sized, cost / length))
    costs = [entry.cost for entry in entries]
    rungs = plan_rungs(request.budget, costs, request.finalists, request.recipe.tokens_per_step)
    needed, available = request.skip + max(rungs[-1].tokens), store.tokens("train")
    if needed > available:
        raise UserError(f"`budget`: the last rung reads up to token {needed:,}, and {request.data} has {available:,}")
    training.training_slice(request.training(request.model, request.out, max(rungs[-1].tokens)), store, checkpoint)
    calibration: Any = read_calibration(pruning, checkpoint, request.windows) if pruning.reads_text else None
    pruner = Pruner(pruning, checkpoint, calibration, device, pick_dtype(request.dtype, device))
    scorings, flops = _scoring(pruner, entries)
    return _Plan(pruner, entries, rungs, scorings, flops)


def _scoring(pruner: Pruner, entries: Sequence[_Entry]) -> tuple[int, float]:
    """How many scorings the candidates need, and their FLOPs: one where scores do not depend on the sizes."""
    checkpoint, method = pruner.checkpoint, pruner.request.prototype
    windows, seqlen = pruner.calibration.size if pruner.calibration else (0, 0)
    passes: dict[str, float] = {}
    for entry in entries:
        calibration = pruner.calibration if isinstance(pruner.calibration, Calibration) else None
        scores = scores_identity(checkpoint, pruner.request.method, entry.target, calibration, device=pruner.device)
        after = entry.candidate.shape
        flops = scoring_flops(checkpoint.shape, after, method, windows * seqlen, seqlen)
        passes[fingerprint(scores) if scores else entry.name] = flops
    return len(passes), sum(passes.values())


def _cut(request: SearchRequest, plan: _Plan, work: Path) -> Path:
    """Cut every candidate, of one workspace of scores; the folder of the cut models."""
    folder, workspace = work / "cut", Workspace(work / "scores")
    checkpoint = plan.pruner.checkpoint
    ancestry = Ancestry.read(checkpoint.directory, repository_of(request.model, checkpoint.directory))
    for entry in plan.entries:
        if (folder / entry.name).is_dir():
            continue
        unfinished = folder / f"{entry.name}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_pruned(checkpoint, plan.pruner.plan(entry.target, workspace), unfinished, ancestry=ancestry)
        sync_tree(unfinished)
        unfinished.rename(folder / entry.name)
    return folder


def _train(
    request: SearchRequest, plan: _Plan, rung: Rung, entry: _Entry, models: Path, folder: Path
) -> dict[str, Any]:
    """Train one candidate in one rung from the cut weights, unless that is done; its tokens and losses."""
    out, tokens = folder / entry.name, rung.tokens[plan.entries.index(entry)]
    if not out.is_dir():
        training.train(request.training(models / entry.name, out, tokens))
    done = read_json(out / "train.json")
    curve = done["result"]["curve"]
    losses = {"before": curve[0]["loss"], "loss": curve[-1]["loss"]}
    return {"shape": entry.name, "tokens": done["result"]["tokens"], "flops": done["flops"], **losses}


def _measure(request: SearchRequest, survivors: Sequence[_Entry], folder: Path) -> list[dict[str, Any]]:
    """Measure the finalists on the held-out windows and rank them; each is compared with the best, item by item."""
    names = tuple(entry.name for entry in survivors)
    fields: dict[str, Any] = {"data": request.data, "windows": request.heldout_windows, "names": names}
    fields |= {"seqlen": request.recipe.sequence, "device": request.device, "dtype": request.dtype}
    results, notes = evaluation.evaluate(EvaluateRequest(models=tuple(folder / name for name in names), **fields))
    for note in notes:
        notify(f"note: {note}")
    losses = {result.name: measured.value for result in results if (measured := result.of(LOSS))}
    best, *others = sorted(results, key=lambda result: losses[result.name])
    rows = [compare_results([best], [result])[0] for result in others]
    compared: list[Any] = [None]
    for row, decision in zip(rows, adjust([row.decision for row in rows]), strict=True):
        verdict = dataclasses.replace(row, decision=decision).verdict
        compared.append({**decision_record(decision), "verdict": verdict, "items": row.items, "unit": row.unit})
    by_name = {entry.name: entry.candidate for entry in survivors}
    return [
        {"folder": str(place), "shape": r.name, **by_name[r.name].record(), "loss": losses[r.name], "behind": behind}
        for place, (r, behind) in enumerate(zip([best, *others], compared, strict=True), start=1)
    ]


def _record(
    request: SearchRequest, plan: _Plan, rungs: Sequence[dict[str, Any]], finalists: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``search.json``."""
    results = [{result["shape"]: result for result in rung["results"]} for rung in rungs]
    orders = [{name: result["before"] for name, result in results[0].items()}]
    orders += [{name: result["loss"] for name, result in rung.items()} for rung in results]
    spent = plan.scoring + sum(result["flops"] for rung in results for result in rung.values())
    shapes = [{"shape": e.name, **e.candidate.record(), "flops_a_token": e.cost} for e in plan.entries]
    return {
        "method": request.method,
        "goal": request.goal.record(),
        "budget": request.budget,
        "frontier": shapes,
        "scoring": {"passes": plan.scorings, "flops": plan.scoring},
        "rungs": [*rungs],
        "rank_correlation": [
            {"rung": number, **_kendall(earlier, later)}
            for number, (earlier, later) in enumerate(pairwise(orders), start=1)
        ],
        "flops": {"planned": plan.flops, "spent": spent},
        "finalists": [*finalists],
    }


def _kendall(earlier: dict[str, float], later: dict[str, float]) -> dict[str, Any]:
    """Kendall's tau between the order of losses before a rung and after it; None where it is not defined."""
    from scipy.stats import kendalltau

    names = list(later)
    if len(names) < 2:
        return {"models": len(names), "kendall": None, "p": None}
    tau: Any = kendalltau([earlier[name] for name in names], [later[name] for name in names])
    value, p = (None if number != number else float(number) for number in (tau.statistic, tau.pvalue))
    return {"models": len(names), "kendall": value, "p": p}
