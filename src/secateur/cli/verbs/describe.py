"""inspect and shapes: what a checkpoint is, and what a configuration would be after pruning."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.cli.verbs.answer import Answer
from secateur.errors import UserError
from secateur.evaluation.cost import sparsity
from secateur.formatting import count, percent, points, scientific
from secateur.methods.base import Method
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint, is_finite, max_positions, read_config
from secateur.model.shapes import SPACES, Shape, removed, solve_depth, solve_width
from secateur.progress import notify, track
from secateur.pruning.pipeline import describe_target
from secateur.pruning.target import Target

__all__ = ["describe", "inspect", "shapes"]

CONTEXT = 2048  #: window that FLOPs per token are averaged over, unless told otherwise


def describe(shape: Shape, context: int) -> dict[str, Any]:
    """What a shape alone tells of a model, as plain values; FLOPs are averaged over windows of ``context`` tokens."""
    return {
        "family": shape.family.name,
        "shape": shape.as_dict(),
        "parameters": {"total": shape.total, "non_embedding": shape.non_embedding},
        "flops_per_token": {"forward": shape.forward_flops(context), "context": context},
        "kv_cache_bytes_per_token": shape.kv_cache_bytes,
    }


def _context(asked: int | None, config: Any) -> int:
    """The window that FLOPs are averaged over: what was asked, unless the model's positions end before."""
    context = asked or CONTEXT
    most = max_positions(config) or context
    if asked and most < asked:
        notify(f"FLOPs for windows of {most} tokens: the model has no more positions (--context is {asked})")
    return min(context, most)


def inspect(arguments: Namespace) -> Answer:
    """``secateur inspect DIR``."""
    checkpoint = Checkpoint(arguments.model)
    shape = checkpoint.shape
    context = _context(arguments.context, checkpoint.config)
    provenance = checkpoint.provenance
    broken = _not_finite(checkpoint)
    answer = {
        "model": str(arguments.model),
        **describe(shape, context),
        "sparsity": sparsity(checkpoint),
        "not_finite": broken,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "digest": checkpoint.digest,
        "provenance": provenance,
    }
    origin = "not written by secateur"
    if provenance:
        origin = ", ".join(f"{k} {v}" for k, v in provenance.items() if isinstance(v, str | int | float))
    lines = [
        f"{arguments.model}  ({checkpoint.family.name}, {answer['dtype']})",
        f"shape        {shape}, head size {shape.head_dim}, vocabulary {shape.vocabulary}"
        + (", tied" if shape.tied else ""),
        f"parameters   {shape.total:,} in total, {shape.non_embedding:,} outside the embeddings",
        f"sparsity     {100 * answer['sparsity']:.2f}% of the block linears' weights are zero",
        f"FLOPs        {shape.forward_flops(context):.4g} a token forwards, three times that in training "
        f"(windows of {context}: 2 x weights + attention)",
        f"KV cache     {shape.kv_cache_bytes:,} bytes a token at 16 bits",
        f"digest       {checkpoint.digest}",
        f"provenance   {origin}",
    ]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        lines.append(f"damaged      {broken[0]}{more}: NaN or infinity among the weights; prune refuses them")
    return answer, "\n".join(lines), 0


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    """The tensors that hold NaN or infinity."""
    names = checkpoint.tensors()
    with track("look for NaN", len(names)) as progress:
        found = []
        for name in names:
            if not is_finite(checkpoint.tensor(name)):
                found.append(name)
            progress.advance()
    return found


def shapes(arguments: Namespace) -> Answer:
    """``secateur shapes CONFIG_OR_DIR``: what a model comes to, from its configuration alone.

    The answer has the keys of ``inspect`` that a shape has. With one target they are those of the resulting shape, and
    ``before`` has the model's own, beside ``removed``, ``asked`` (the ratio, or the sizes), ``of``, ``drift`` and
    ``note``. With a ratio and neither a method nor axes they are the model's own, and ``targets`` has each way to the
    ratio. With several ratios, ``outputs`` has for each what it would give alone.
    """
    targets = [
        Target.parse(ratio=ratio, of=arguments.of, shape=arguments.shape, axes=arguments.axes)
        for ratio in arguments.ratio or [None]
    ]
    target = targets[0]
    target.check_amount()
    if target.ratio is None and not target.sizes and (arguments.method or target.axes):
        raise UserError(f"{'--method' if arguments.method else '--axes'}: goes with a --ratio; say how much to remove")
    method = get_method(arguments.method) if arguments.method else None
    if method is not None:
        target.check(method, arguments.method)
    path = Path(arguments.model)
    _, config, before = read_config(path / "config.json" if path.is_dir() else path)
    context = _context(arguments.context, config)
    head = {"model": str(arguments.model)}
    own = describe(before, context)
    title = f"{arguments.model}  ({before.family.name})"
    if target.ratio is None and not target.sizes:
        return {**head, **own}, "\n".join([title, "", *_table({"": own}), "", _BASIS.format(context)]), 0
    told = [_section(before, own, target, method, arguments.method, context) for target in targets]
    lines = [title, *(line for _, section in told for line in ["", *section]), _BASIS.format(context)]
    answer = told[0][0] if len(told) == 1 else {"outputs": [found for found, _ in told]}
    return {**head, **answer}, "\n".join(lines), 0


def _section(
    before: Shape, own: dict[str, Any], target: Target, method: Method | None, name: str, context: int
) -> tuple[dict[str, Any], list[str]]:
    """What one target comes to, or each way to it where several are open: for programs and for people."""
    if target.sizes or target.axes or method is not None:
        found = _single(before, target, method, name, context)
        return {**found, "before": own}, [*_table({"before": own, "after": found}), "", *_footer([found], target)]
    ways = _candidates(before, target, context)
    columns = {"own": own} | {way: found for way, found in ways.items() if "error" not in found}
    lines = [*_table(columns), "", *_footer(list(columns.values())[1:], target)]
    lines += [f"{way}: {found['error']}" for way, found in ways.items() if "error" in found]
    return {**own, "asked": target.ratio, "of": target.of or "non_embedding", "targets": ways}, lines


def _single(before: Shape, target: Target, method: Method | None, name: str, context: int) -> dict[str, Any]:
    """What one target comes to."""
    if method is not None:
        after = target.shape(before, method, name)
        sparse = method.granularity == "sparse"
        return _zeroed(before, target, context) if sparse else _result(before, after, target, context)
    if target.sizes:
        return _result(before, target.reached(before), target, context)
    assert target.ratio is not None
    spaces = [space for space in SPACES if space in target.axes]
    return _result(before, solve_width(before, target.ratio, spaces, target.of or "non_embedding"), target, context)


def _result(before: Shape, after: Shape, target: Target, context: int) -> dict[str, Any]:
    note = None
    try:
        opened = after.openable(where="note")
    except UserError as error:  # it can be counted all the same
        opened, note = after, str(error).removeprefix("note: ")
    if opened.family is not before.family:
        note = (
            f"the config of {before.family.name} refuses heads ({after.heads}) that do not divide the hidden size "
            f"({after.hidden}): such a checkpoint is written with model_type {opened.family.model_types[0]}"
        )
    gone = removed(before, after)
    of = None if target.ratio is None else target.of or "non_embedding"
    return {
        **describe(opened, context),
        "removed": gone,
        "asked": target.ratio if of else dict(target.sizes),
        "of": of,
        "drift": gone[of] - target.ratio if of and target.ratio is not None else None,
        "note": note,
    }


def _zeroed(before: Shape, target: Target, context: int) -> dict[str, Any]:
    """What zeroing single weights comes to: the shape stays."""
    zeros = target.sparsity * before.layers * before.linear_parameters
    return {
        **describe(before, context),
        "removed": {"total": zeros / before.total, "non_embedding": zeros / before.non_embedding},
        "asked": target.ratio,
        "of": "block_weights",
        "drift": None,
        "note": "single weights are zeroed: shape, FLOPs and KV cache stay; shares before rounding to whole weights",
    }


#: The ways to a ratio that are shown side by side -> the spaces that are narrowed; none: layers go.
_WAYS = {"depth": (), "width": ("hidden", "ffn"), "heads": ("ffn", "kv")}


def _candidates(before: Shape, target: Target, context: int) -> dict[str, dict[str, Any]]:
    """Each way to the ratio, or its ``error``.

    Raises:
        UserError: if there is no way at all.
    """
    assert target.ratio is not None
    of = target.of or "non_embedding"
    found: dict[str, dict[str, Any]] = {}
    for way, spaces in _WAYS.items():
        try:
            after = solve_width(before, target.ratio, spaces, of) if spaces else solve_depth(before, target.ratio, of)
            found[way] = _result(before, after, target, context)
        except UserError as error:
            found[way] = {"error": str(error).removeprefix(f"--ratio {target.ratio:g}: ")}
    if all("error" in result for result in found.values()):
        told = "; ".join(f"{way}: {result['error']}" for way, result in found.items())
        raise UserError(f"--ratio {target.ratio:g}: {told}")
    return found


def _table(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Descriptions side by side, aligned."""
    rows: list[list[str]] = [["", *columns]] if any(columns) else []
    rows += [[label, *(text(found) for found in columns.values())] for label, text in _ROWS.items()]
    if any("removed" in found for found in columns.values()):
        gone = [found.get("removed") for found in columns.values()]
        rows.append(["removed of all", *("" if g is None else percent(g["total"]) for g in gone)])
        rows.append(["removed outside embeddings", *("" if g is None else percent(g["non_embedding"]) for g in gone)])
        drifts = [found.get("drift") for found in columns.values()]
        if any(drift is not None for drift in drifts):
            rows.append(["drift, points", *("" if d is None else points(d) for d in drifts)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    return [_aligned(row, widths) for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _heads(found: Mapping[str, Any]) -> str:
    return f"{found['shape']['heads']} / {found['shape']['kv_heads']}"


_ROWS = {
    "hidden": lambda found: str(found["shape"]["hidden"]),
    "FFN": lambda found: str(found["shape"]["ffn"]),
    "layers": lambda found: str(found["shape"]["layers"]),
    "heads / KV heads": _heads,
    "parameters": lambda found: count(found["parameters"]["total"]),
    "outside the embeddings": lambda found: count(found["parameters"]["non_embedding"]),
    "FLOPs a token, forwards": lambda found: scientific(found["flops_per_token"]["forward"]),
    "KV cache a token, bytes": lambda found: f"{found['kv_cache_bytes_per_token']:,}",
}


_BASIS = "FLOPs: 2 x weights + attention, averaged over windows of {} tokens; KV cache at 16 bits"


def _footer(results: Sequence[Mapping[str, Any]], target: Target) -> list[str]:
    """What was asked, and what else is to be known of the results."""
    asked = {"ratio": target.ratio, "of": results[0]["of"]} if target.ratio is not None else {}
    asked |= ({"shape": target.sizes} if target.sizes else {}) | ({"axes": target.axes} if target.axes else {})
    words = describe_target(asked)
    return [f"asked: {words}", *(f"note: {text}" for text in dict.fromkeys(r["note"] for r in results) if text)]
