"""prune: score a checkpoint, decide what to keep, and write the pruned one; mask: apply its masks to another one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur import distributed
from secateur.cli.verbs.answer import Answer, request_of
from secateur.errors import UserError, spell
from secateur.formatting import byte_size, count, percent, plural, points
from secateur.progress import clock_time
from secateur.pruning.iterations import describe_steps
from secateur.pruning.request import PruneRequest

if TYPE_CHECKING:
    from secateur.pruning.job import Pruned

__all__ = ["mask", "prune"]


def prune(arguments: Namespace) -> Answer:
    """``secateur prune MODEL OUT``."""
    ratio = tuple(arguments.ratio) if arguments.ratio else None
    request = request_of(PruneRequest, arguments, ratio=ratio, options=_read_options(arguments.options))
    from secateur.pruning.job import prune_directory

    outputs = prune_directory(request)
    if not distributed.is_main():
        return {}, "", 0
    use = outputs[0].use
    used = {"seconds": use.seconds, "memory": use.memory, "device": use.device, "processes": distributed.world_size()}
    records = [output.record() for output in outputs]
    answer = {**records[0], "used": used}
    if len(outputs) > 1:
        answer = {"out": str(arguments.out), "outputs": records, "used": used}
    text = f"{clock_time(use.seconds)}" + (f", at most {byte_size(use.memory)} of memory" if use.memory else "")
    text += f", {byte_size(use.device)} on the device" if use.device is not None else ""
    text += f" (the first of {used['processes']} processes)" if used["processes"] > 1 else ""
    lines = [spell(line, arguments.spelling) for output in outputs for line in [*_describe(output), ""]]
    lines[-1] = f"used         {text}"
    lines.append(f"next         secateur eval {outputs[0].path} --data text:FILE")
    return answer, "\n".join(lines), 0


def mask(arguments: Namespace) -> Answer:
    """``secateur mask MERGED --plan PRUNED``."""
    from secateur.pruning.mask import MaskRequest, mask_checkpoint

    result = mask_checkpoint(request_of(MaskRequest, arguments))
    sparsity = percent(result.masked / result.weights)
    lines = [
        f"{result.path}: {result}",
        f"sparsity     {sparsity} of the weights of {plural(result.matrices, 'matrix', 'matrices')}",
        f"next         secateur eval {result.path} --data text:FILE",
    ]
    return result.record(), "\n".join(lines), 0


def _read_options(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``--option key=value``, given any number of times."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"`options`: {pair} is not KEY=VALUE, as in task=winogrande")
        if key in options:
            raise UserError(f"`options`: {key} is set twice")
        options[key] = value
    return options


def _describe(output: Pruned) -> list[str]:
    """The lines about one output."""
    from secateur.model.runtimes import describe_runtimes
    from secateur.pruning.goals import describe_reached
    from secateur.pruning.pipeline import removed_shares
    from secateur.pruning.target_text import describe_target

    plan, removed = output.plan, output.removed
    shares = f"{percent(removed['total'])} of all parameters, {percent(removed['non_embedding'])} of those outside"
    shares += " the embeddings"
    if "block_weights" in removed:
        shares += f", {percent(removed['block_weights'])} of the weights of the blocks' linears"
    lines = [
        f"{output.path}: {output.method}, {plan.summary['detail']}",
        f"asked        {describe_target(plan.request)}",
        f"removed      {shares}",
    ]
    if output.goal:
        lines.insert(2, f"reached      {describe_reached(output.goal)}")
    if output.family_change:
        lines.append(f"family       {output.family_change}")
    drift: Any = removed_shares(plan)["drift"]
    if drift is not None:
        lines.append(f"drift        {points(drift)} points from the ratio asked")
    if "iterations" in plan.summary:
        lines.append(f"steps        {describe_steps(plan.request, plan.summary)}")
    lines += _describe_reconstruction(plan.summary.get("reconstruction"))
    runs_in = describe_runtimes(output.runs_in, sparse=bool(plan.masks))
    return [*lines, f"calibration  {_describe_calibration(output)}", f"runs in      {runs_in}"]


def _describe_reconstruction(record: Mapping[str, Any] | None) -> list[str]:
    """How far tuning brought each block's output to the dense block's; empty without tuning."""
    if record is None:
        return []
    held_out = f", {plural(record['held_out_windows'], 'window')} held out" if record["held_out_windows"] else ""
    lines = [
        f"tuned        {plural(record['steps'], 'step')} of attention and of FFN, {count(record['tokens'])} tokens of "
        f"{plural(record['windows'], 'window')}{held_out}; error of each block's output:"
    ]
    for number, block in enumerate(record["blocks"]):
        text = f"{percent(block['before'])} to {percent(block['after'])}"
        if block["held_out_before"] is not None:
            text += f"; held out {percent(block['held_out_before'])} to {percent(block['held_out_after'])}"
        text += "" if block["tuned"] else "; keeps its weights from before"
        lines.append(f"  block {number:<4} {text}")
    return lines


def _describe_calibration(output: Pruned) -> str:
    record = output.calibration
    if record["source"]:
        digest = record["hash"][:16]
        windows = f"{plural(record['windows'], 'window')} of {plural(record['seqlen'], 'token')}"
        return f"{windows} of {record['source']}, hash {digest}"
    if "task" in output.plan.summary:
        return f"none, scored by the task {output.plan.summary['task']['name']}"
    return "none, no text was read"
