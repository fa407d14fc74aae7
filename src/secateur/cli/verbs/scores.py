"""The tables of eval and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.comparison.items import Comparison
from secateur.evaluation.results import EvaluationResults, Measurement, check_same_protocols
from secateur.evaluation.suite import ZERO_SHOT
from secateur.formatting import fixed, plural

__all__ = ["aligned", "comparison_table", "results_table"]

_ABSENT = "-"


def results_table(results: Sequence[EvaluationResults]) -> str:
    """Figures of one or several models side by side, and under which protocols they hold.

    Raises:
        UserError: if two models were measured under different protocols.
    """
    names = check_same_protocols((r.model, m.name, m.protocol) for r in results for m in r.measurements)
    firsts = {name: next(m for r in results if (m := r.of(name))) for name in names}
    rows: list[list[str]] = []
    for name, measured in firsts.items():
        rows.append([_title(measured), *(_figure(r.of(name)) for r in results)])
        if measured.kind == "loss":
            rows.append(["  perplexity", *(_detail(r.of(name), "perplexity") for r in results)])
            rows += _breakdown(name, results, "by_domain", lambda part: f"  domain {part['domain']}")
    if set(ZERO_SHOT) <= set(names):
        values = [[m.value for t in ZERO_SHOT if (m := r.of(t))] for r in results]
        rows.append(["average of the eight zero-shot tasks", *(f"{np.mean(v):.4f}" for v in values)])
    rows += _costs(results)
    lines = aligned([["", *(r.name for r in results)], *rows])
    lines += [f"{name}: {_protocol(measured)}" for name, measured in firsts.items()]
    lines += [f"{r.name}: weights: {_served(r.about['served'])}" for r in results if "served" in r.about]
    if results[0].cost:
        timed = results[0].cost["workload"]
        lines += [_workload(results[0].cost)] if timed else []
        lines += [f"{r.name}: {'sparsity: ' if timed else ''}{r.cost['sparsity']['note']}" for r in results if r.cost]
    return "\n".join(lines)


def _title(measured: Measurement) -> str:
    unit = measured.scale.replace("nats per ", "nats/") if measured.kind == "loss" else measured.protocol["metric"]
    return f"{measured.name}, {unit}"


def _figure(measured: Measurement | None) -> str:
    if measured is None:
        return _ABSENT
    if measured.kind == "loss" or any(item["value"] is None for item in measured.items):
        return fixed(measured.value)
    values = np.asarray([item["value"] for item in measured.items], dtype=np.float64)
    spread = f" ±{values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{measured.value:.4f}{spread}"


def _detail(measured: Measurement | None, key: str) -> str:
    return fixed(measured.details[key]) if measured else _ABSENT


def _breakdown(name: str, results: Sequence[EvaluationResults], key: str, title: Any) -> list[list[str]]:
    """Rows of the parts of a loss; all models have the same ones, since the protocol is one."""
    parts = [loss.details.get(key, []) if (loss := r.of(name)) else [] for r in results]
    first = next((p for p in parts if p), [])
    return [[title(part), *(fixed(p[i]["loss"]) if p else _ABSENT for p in parts)] for i, part in enumerate(first)]


def _protocol(measured: Measurement) -> str:
    """What a figure was measured on, in a line."""
    protocol = measured.protocol
    mark = f"protocol {protocol['fingerprint'][:16]}"
    if measured.tasks:
        how = "documents" if protocol["by_size"] else "tasks"
        return (
            f"mean of {plural(len(measured.tasks), 'task')} over {how}, {plural(protocol['documents'], 'document')}, "
            f"lm-eval {protocol['lm_eval']}, {mark}"
        )
    if "lm_eval" in protocol:
        shots = f"{protocol['few_shot']}-shot" if protocol["few_shot"] else "zero-shot"
        error = ", ± one standard error" if "±" in _figure(measured) else ""
        return (
            f"{plural(len(measured.items), 'document')}, lm-eval {protocol['lm_eval']}, "
            f"task version {protocol['version']}, {shots}{error}, {mark}"
        )
    stride = f", stride {protocol['stride']}" if "stride" in protocol else ""
    split = f" ({protocol['split']})" if "split" in protocol else ""
    return (
        f"{protocol['source']}{split}: {plural(protocol['tokens'], 'token')} predicted in "
        f"{plural(protocol['windows'], 'window')} of {protocol['seqlen']:,}{stride}, "
        f"hash {protocol['hash'][:16]}, {mark}"
    )


def _costs(results: Sequence[EvaluationResults]) -> list[list[str]]:
    """A row for each figure of cost."""
    tables = [{_key(f): f for f in r.cost["figures"]} if r.cost else {} for r in results]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [[_cost_title(*key), *(_cost(table.get(key)) for table in tables)] for key in keys]


def _key(figure: dict[str, Any]) -> tuple[str, str, str, int | None]:
    return figure["name"], figure["unit"], figure["execution"], figure.get("batch")


def _cost_title(name: str, unit: str, execution: str, batch: int | None) -> str:
    at = f", batch {batch}" if batch else ""
    how = f", {execution}" if execution != "dense" else ""
    return f"{name}{at}{how}, {unit}"


def _cost(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return _ABSENT
    value = _number(figure["value"])
    return f"{value} ({_number(figure['low'])} to {_number(figure['high'])})" if "low" in figure else value


def _served(served: Any) -> str:
    """How the weights of a model are served, and which are not."""
    stored = plural(len(served["as_stored"]), "matrix", "matrices")
    rest = f"; {stored} of the blocks as stored" if served["as_stored"] else ""
    others = "" if served["weights"] == "bf16" else "; embeddings, head and norms as stored"
    return f"{served['weights']}, {served['form']}{others}{rest}; {served['bytes']:,} bytes in all"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e15 else f"{value:.3g}"


def _workload(cost: Any) -> str:
    work = cost["workload"]
    threads = f", {plural(cost['threads'], 'thread')}" if cost["threads"] else ""
    return (
        f"cost: on {cost['device']}{threads}, {cost['dtype']}, prompts of {plural(work['prompt'], 'token')}, "
        f"{plural(work['new'], 'new one')}; medians of {work['repeats']} after {work['warm_up']} to warm up "
        "(with quartiles)"
    )


def comparison_table(comparisons: Sequence[Comparison], a: Sequence[str], b: Sequence[str]) -> str:
    """What two models differ in, and how sure that is."""
    head = ["", "A", "B", "A better by", "95% interval", "items", "p", "verdict"]
    rows = [head]
    for c in comparisons:
        if c.difference is None or c.low is None or c.high is None or c.a is None or c.b is None or c.p is None:
            dashes = [_ABSENT] * (len(head) - 2)
            rows.append([c.name, *dashes, f"{c.verdict}: {c.reason}"])
            continue
        rows.append(
            [
                c.name,
                fixed(c.a),
                fixed(c.b),
                f"{c.difference:+.4f}",
                f"{c.low:+.4f} to {c.high:+.4f}",
                f"{c.above}:{c.below} of {c.items} {c.unit}",
                f"{c.p:.3g}",
                _verdict(c),
            ]
        )
    lines = [f"A: {', '.join(a)}", f"B: {', '.join(b)}", *aligned(rows)]
    lines.append("items: on how many A and B are better; p: of no difference, two-sided; loss in nats per token")
    seeds = max((c.decision.seeds for c in comparisons), default=0)
    if seeds > 1:
        lines.append(f"intervals cover the choice of items and {seeds} seeds")
    elif len(a) > 1:
        lines.append("the seeds are identical and count as one; intervals cover the choice of items")
    else:
        lines.append("intervals cover the choice of items, for this pair of runs; several seeds cover training as well")
    if any(c.unit == "windows" for c in comparisons):
        lines.append("the documents of windows are not known: each window counts as a document of its own")
    return "\n".join(lines)


def _verdict(comparison: Comparison) -> str:
    words = {"A": "A is better", "B": "B is better", "undecided": f"undecided: {comparison.reason}"}
    if comparison.verdict == "equal within margin":
        return f"equal within {comparison.decision.margin:g}"
    return words.get(comparison.verdict, comparison.verdict)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, the first one to the left, the others to the right but for a last one of words."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
