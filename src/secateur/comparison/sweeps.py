"""Sweeps of learning rates: the trials of each run beside those of the runs that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.comparison.ablation import CONTINUED
from secateur.comparison.index import Group, Index, Model
from secateur.comparison.naming import group_name
from secateur.comparison.records import Sweep

__all__ = ["PARENT", "SweepPanel", "sweep_panels", "sweep_rows", "sweep_subject", "unique_sweeps"]

PARENT = "parent"  #: name of a parent's sweep


@dataclass(frozen=True)
class SweepPanel:
    """The sweeps of one comparison at one budget, or those of the parents."""

    title: str
    model: Model | None  #: None for the parents
    sweeps: tuple[Sweep, ...]


def unique_sweeps(index: Index) -> list[Sweep]:
    """The first sweep of each choice, since runs of the same architecture and tokens share one."""
    sweeps: dict[str, Sweep] = {}
    for sweep in index.results.sweeps:
        sweeps.setdefault(sweep.stage, sweep)
    return list(sweeps.values())


def sweep_subject(index: Index, sweep: Sweep) -> str:
    """The name of the comparison that a sweep's run belongs to; for a parent, trained on or not, its own."""
    if sweep.name in (PARENT, CONTINUED):
        return sweep.parent
    return group_name(_group(sweep), [group.pooled for group in index.groups], target=True)


def sweep_panels(index: Index) -> list[SweepPanel]:
    """A panel for the parents and one for each comparison, unless an earlier panel shows the same sweeps."""
    by_group: dict[Group | None, list[Sweep]] = {}
    for sweep in index.results.sweeps:
        by_group.setdefault(None if sweep.name == PARENT else _group(sweep), []).append(sweep)
    panels: dict[frozenset[str], SweepPanel] = {}
    for group, sweeps in by_group.items():
        title = sweep_subject(index, sweeps[0]) if group else "Pretraining"
        panel = SweepPanel(title, group.model if group else None, tuple(sweeps))
        panels.setdefault(frozenset(sweep.stage for sweep in sweeps), panel)
    return list(panels.values())


def sweep_rows(index: Index) -> list[dict[str, Any]]:
    """One row for each trial."""
    keys = ("name", "parent", "method", "target", "objective", "retrain_tokens", "seed", "tokens")
    return [
        {
            **{key: getattr(sweep, key) for key in keys},
            "rate": rate,
            "loss": loss,
            "best": None if sweep.rate is None else rate == sweep.rate,
            "at_edge": sweep.at_edge,
            "is_run": None if sweep.rate is None else sweep.whole and rate == sweep.rate,
        }
        for sweep in index.results.sweeps
        for rate, loss in zip(sweep.rates, sweep.losses, strict=True)
    ]


def _group(sweep: Sweep) -> Group:
    return Group(sweep.parent, sweep.method, sweep.target, sweep.retrain_tokens, sweep.objective, None)
