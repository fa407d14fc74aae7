"""inspect and shapes: what a checkpoint is, and what a configuration would be after pruning."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.cli.verbs.answer import Answer, request_of
from secateur.formatting import byte_size, count, percent, plain, points, scientific
from secateur.model.families import Family
from secateur.pruning.preview import ShapesRequest, preview_shapes
from secateur.pruning.target import Target
from secateur.pruning.target_text import describe_target

__all__ = ["inspect", "shapes"]


def inspect(arguments: Namespace) -> Answer:
    """``secateur inspect DIR``."""
    from secateur.evaluation.inspection import InspectRequest, inspect_checkpoint
    from secateur.model.runtimes import describe_runtimes

    inspection = inspect_checkpoint(request_of(InspectRequest, arguments))
    shape, context, provenance = inspection.shape, inspection.context, inspection.provenance
    origin = "not written by secateur"
    if provenance:
        origin = ", ".join(f"{k} {plain(v)}" for k, v in provenance.items() if isinstance(v, str | int | float))
    lines = [
        f"{inspection.model}  ({shape.family.name}, {inspection.dtype})",
        f"shape        {shape}, head size {shape.head_dim}, vocabulary {shape.vocabulary}"
        + (", tied" if shape.tied else ""),
        f"parameters   {shape.total:,} in total, {shape.non_embedding:,} outside the embeddings"
        + (f", {shape.active_parameters:,} active for a token" if shape.layers_with("experts") else ""),
        f"sparsity     {100 * inspection.sparsity:.2f}% of the block linears' weights are zero",
        f"FLOPs        {shape.forward_flops(context):.4g} a token forwards, three times that in training "
        f"(windows of {context}: 2 x weights + attention)",
        f"KV cache     {shape.kv_cache_bytes:,} bytes a token at 16 bits",
        f"can be cut   {_axes(shape.family)}",
        f"digest       {inspection.digest}",
        f"provenance   {origin}",
        f"runs in      {describe_runtimes(inspection.runs_in, sparse=inspection.sparsity >= 0.01)}",
    ]
    if around := inspection.image_text:
        lines.insert(
            3, f"around it    {around['model_type']}: {around['parameters']:,} parameters of vision tower and projector"
        )
    if broken := inspection.not_finite:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        lines.append(f"damaged      {broken[0]}{more}: NaN or infinity among the weights; prune refuses them")
    return inspection.record(), "\n".join(lines), 0


def _axes(family: Family) -> str:
    """What of a family can be cut, and why the rest cannot."""
    return "; ".join([", ".join(family.axes), *(f"not {axis}: {reason}" for axis, reason in family.uncut.items())])


def shapes(arguments: Namespace) -> Answer:
    """``secateur shapes CONFIG_OR_DIR``.

    The answer has the keys of ``inspect`` that a shape has. With one target they are those of the resulting shape, and
    ``before`` has the model's own, beside ``removed``, ``asked`` (the ratio, or the sizes), ``of``, ``drift`` and
    ``note``. With a ratio and neither a method nor axes they are the model's own, and ``targets`` has each way to the
    ratio. With several ratios, ``outputs`` has for each what it would give alone.
    """
    request = request_of(ShapesRequest, arguments, ratio=tuple(arguments.ratio) if arguments.ratio else None)
    preview = preview_shapes(request)
    lines = [f"{preview.model}  ({preview.before['family']})"]
    if not preview.outputs:
        lines += ["", *_table({"": preview.before}), ""]
    for target, output in zip(request.targets, preview.outputs, strict=False):
        lines += ["", *_section(preview.before, target, output)]
    lines.append(
        f"FLOPs: 2 x weights + attention, averaged over windows of {preview.context} tokens; KV cache at 16 bits"
    )
    return preview.record(), "\n".join(lines), 0


def _section(before: Mapping[str, Any], target: Target, output: Mapping[str, Any]) -> list[str]:
    """One target, or each way to it where several are open."""
    if "targets" not in output:
        table = _table({"before": before, "after": output})
        return [*table, "", *_footer([output], target), *output.get("text", [])]
    ways = output["targets"]
    columns = {"own": before} | {way: result for way, result in ways.items() if "error" not in result}
    lines = [*_table(columns), "", *_footer(list(columns.values())[1:], target)]
    for way, result in columns.items():
        first, *rest = result.get("text", [""])
        lines += [f"{way}: {first}", *rest] if first else []
    return lines + [f"{way}: {result['error']}" for way, result in ways.items() if "error" in result]


def _table(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Descriptions side by side, aligned."""
    rows: list[list[str]] = [["", *columns]] if any(columns) else []
    shapes = [column["shape"] for column in columns.values()]
    labels = {**_ROWS, **_EXPERT_ROWS} if any("experts" in shape for shape in shapes) else _ROWS
    if not any(shape["ffn"] for shape in shapes):  # every layer has experts
        labels = {label: text for label, text in labels.items() if label != "FFN"}
    rows += [[label, *(text(column) for column in columns.values())] for label, text in labels.items()]
    if any("memory" in column for column in columns.values()):
        totals = [column.get("memory") for column in columns.values()]
        rows.append(["memory to serve it", *("" if m is None else byte_size(m["total"]) for m in totals)])
    if any("removed" in column for column in columns.values()):
        shares = [column.get("removed") for column in columns.values()]
        rows.append(["removed of all", *("" if s is None else percent(s["total"]) for s in shares)])
        rows.append(["removed outside embeddings", *("" if s is None else percent(s["non_embedding"]) for s in shares)])
        drifts = [column.get("drift") for column in columns.values()]
        if any(drift is not None for drift in drifts):
            rows.append(["drift, points", *("" if d is None else points(d) for d in drifts)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    return [_align(row, widths) for row in rows]


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


_ROWS = {
    "hidden": lambda column: str(column["shape"]["hidden"]),
    "FFN": lambda column: str(column["shape"]["ffn"]),
    "layers": lambda column: str(column["shape"]["layers"]),
    "heads / KV heads": lambda column: f"{column['shape']['heads']} / {column['shape']['kv_heads']}",
    "parameters": lambda column: count(column["parameters"]["total"]),
    "outside the embeddings": lambda column: count(column["parameters"]["non_embedding"]),
    "FLOPs a token, forwards": lambda column: scientific(column["flops_per_token"]["forward"]),
    "KV cache a token, bytes": lambda column: f"{column['kv_cache_bytes_per_token']:,}",
}


_EXPERT_ROWS = {  # of mixtures
    "experts, of a token": lambda column: f"{column['shape']['experts']}, {column['shape']['active']}",
    "FFN of an expert": lambda column: str(column["shape"]["expert_ffn"]),
    "active parameters": lambda column: count(column["parameters"].get("active", column["parameters"]["total"])),
}


def _footer(results: Sequence[Mapping[str, Any]], target: Target) -> list[str]:
    """The request, and the notes on the results."""
    fields: dict[str, Any] = {"ratio": target.ratio, "of": results[0]["of"]} if target.ratio is not None else {}
    fields |= {"goal": target.goal.record()} if target.goal else {}
    fields |= ({"shape": target.sizes} if target.sizes else {}) | ({"axes": target.axes} if target.axes else {})
    notes = dict.fromkeys(result["note"] for result in results)
    return [f"asked: {describe_target(fields)}", *(f"note: {text}" for text in notes if text)]
