"""Sentences about sweeps of learning rates. ASCII, except for the minus sign."""

from __future__ import annotations

from secateur.comparison.index import Index
from secateur.comparison.records import Sweep
from secateur.comparison.sweeps import PARENT, sweep_subject, unique_sweeps
from secateur.formatting import join_words, plural

__all__ = ["SWEEPS_TITLE", "edge_sentence", "edge_sentences", "sweep_name", "sweep_sentences"]

SWEEPS_TITLE = "Learning rates"
_SIDES = {"low": ("lowest", "lower"), "high": ("highest", "higher")}


def sweep_name(index: Index, sweep: Sweep) -> str:
    """The run whose rate a sweep chooses, in words."""
    subject = sweep_subject(index, sweep)
    if sweep.name == PARENT:
        return f"the parent {subject}" if subject != PARENT else "the parent"
    return f"{sweep.name} of {subject}"


def sweep_sentences(index: Index) -> list[str]:
    """How the rates were chosen, and how many lie at the end of what was tried; empty without a sweep."""
    sweeps = unique_sweeps(index)
    if not sweeps:
        return []
    seeds = join_words([str(seed) for seed in sorted({sweep.seed for sweep in sweeps})])
    text = f"Trials with seed {seeds} chose the learning rates, on held-out windows that no final loss is measured on"
    text += "; the other seeds have the same rates." if index.several_seeds else "."
    text += " The best trial is the run itself if it has all tokens of it." * any(sweep.whole for sweep in sweeps)
    texts = [text]
    pending = sum(sweep.rate is None for sweep in sweeps)
    if pending:
        texts.append(f"Not complete: {pending} of {plural(len(sweeps), 'sweep')}.")
    edges = sum(sweep.at_edge is not None for sweep in sweeps)
    if edges:
        texts.append(
            f"Warning: in {edges} of {plural(len(sweeps), 'sweep')} the best rate is the lowest or the highest that "
            "was tried. A better one may lie beyond, so that these runs may be worse than they could be; add rates "
            "there to sweep.rates."
        )
    return texts


def edge_sentences(index: Index) -> list[str]:
    """One sentence for each sweep whose best rate is at the end of what was tried."""
    return [edge_sentence(index, sweep) for sweep in unique_sweeps(index) if sweep.at_edge]


def edge_sentence(index: Index, sweep: Sweep) -> str:
    """What to try next to a best rate at the end of a sweep."""
    assert sweep.rate is not None and sweep.at_edge
    end, beyond = _SIDES[sweep.at_edge]
    name = sweep_name(index, sweep)
    rates = plural(len(sweep.rates), "rate")
    return f"{name[0].upper()}{name[1:]}: {sweep.rate:g} is the {end} of {rates}; try {beyond} ones."
