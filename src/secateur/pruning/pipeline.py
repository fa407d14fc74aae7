"""score -> select -> plan: one function for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.block_walk import BlockWalk, default_batch
from secateur.calibration.image_walk import ImageWalk
from secateur.calibration.journal import Workspace
from secateur.calibration.statistics import GradientStatistic
from secateur.config import identity
from secateur.data.tokenizer import token_hash
from secateur.errors import UserError
from secateur.evaluation.lm_eval.tasks import Task
from secateur.formatting import count, percent, plural
from secateur.methods.base import ExpertMethod, LearnedMethod, Method, RemovalMethod, WeightMethod, WidthMethod
from secateur.methods.registry import get_method
from secateur.model.card import Ancestry, family_change, model_card, short_source
from secateur.model.checkpoint import Checkpoint
from secateur.model.checkpoint_writing import write_checkpoint
from secateur.model.companions import copy_companions
from secateur.model.layer_pattern import layer_kinds
from secateur.model.plan import Plan
from secateur.model.runtimes import Support, Traits, check_runtimes, describe_runtimes
from secateur.model.shapes import Shape
from secateur.model.surgery import carry_masks, cut_config, cut_tensors
from secateur.model.zeros import UNMASKED, ZeroCount
from secateur.progress import notify
from secateur.pruning.allocation.allocate import allocate_zeros, ratios_by_layer
from secateur.pruning.calibration import Calibration
from secateur.pruning.cost import allocation_flops, reads_text, task_of
from secateur.pruning.expert_scoring import describe_routing
from secateur.pruning.goals import complete_target, describe_reached, reached
from secateur.pruning.image_samples import ImageSamples
from secateur.pruning.iterations import describe_steps
from secateur.pruning.layer_choice import pattern_to_keep
from secateur.pruning.reconstruction import describe_reconstruction
from secateur.pruning.scoring import score_and_select
from secateur.pruning.target import Target
from secateur.pruning.target_text import describe_target

__all__ = ["check_config", "make_plan", "removed_shares", "runtimes_of", "scores_identity", "write_pruned"]


def make_plan(
    checkpoint: Checkpoint,
    method: str,
    target: Target,
    calibration: Calibration | ImageSamples | None,
    *,
    options: Mapping[str, Any] | None = None,
    task: Task | None = None,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    workspace: Workspace | None = None,
) -> Plan:
    """Score a checkpoint with a method and select what to keep.

    Of several processes (:mod:`secateur.distributed`) each calls this with the same arguments, except for the device.

    Args:
        checkpoint: the model; it is read block by block.
        calibration: what to score on; None for methods that do not read text (:func:`reads_text`).
        task: how to measure the task that the method's options name; None for its defaults.
        batch: windows at once; None for what suits the device.
        dtype: of the forward pass; statistics and scores are float32 or better.
        workspace: where to keep what is computed block by block; scores that are there already are not computed again.
            Several processes need a directory that they all see.

    Raises:
        UserError: on an unknown method or option, a method that learns (:func:`secateur.pruning.learned.learn`), a
            target that this model has no shape for, or values that are not finite.
    """
    prototype = get_method(method, options)
    if isinstance(prototype, LearnedMethod):
        raise UserError(
            f"{method}: learns what to cut in training and has no scores beforehand; use secateur.prune with `out`"
        )
    target = complete_target(target, checkpoint.shape, prototype, method)
    after = target.shape(checkpoint.shape, prototype, method)
    check_config(checkpoint, after)
    pattern = pattern_to_keep(checkpoint, target, prototype, after.layers)
    if reads_text(prototype) and calibration is None:
        raise UserError(f"`calibration`: {method} is scored on text; name a source of it")
    if task_of(prototype) and task is None:
        task = Task(task_of(prototype), few_shot=0)
    if task is not None:
        _ = task.requests  # report faults of the task before the weights are read
    inputs = calibration if reads_text(prototype) else None
    _check_finite(checkpoint, whole=task is not None)
    by_window = any(issubclass(kind, GradientStatistic) for kind in prototype.needs)
    workspace, key = workspace or Workspace(), _journal_key(prototype, target, checkpoint.shape, after)
    execution: dict[str, Any] = {"device": device, "dtype": dtype, "label": f"score {method}"}
    execution |= {"store": workspace.store(key), "journal": workspace.journal(key)}
    if isinstance(inputs, ImageSamples):
        if by_window:
            raise UserError(f"`calibration`: {method} goes by gradients, which are computed on text alone; name text")
        walk = ImageWalk(checkpoint, inputs.samples, **execution)
    else:
        walk = BlockWalk(checkpoint, inputs and inputs.windows, batch=1 if by_window else batch, **execution)
    if prototype.stochastic:
        walk.journal.finished_steps = 0  # the first random numbers belong to the first block
    zeros, allocated = _allocate(prototype, checkpoint, target, inputs, batch, device, dtype, workspace, key)
    with walk.journal.async_writes(device):
        decision = score_and_select(prototype, walk, target, after, task, batch, pattern, zeros)
    decision.get("summary", {}).update(allocated)
    walk.journal.close()
    record: dict[str, Any] = inputs.record() if inputs else {"source": None}
    if inputs and dtype != torch.float32:
        record["dtype"] = str(dtype).removeprefix("torch.")
    request = target.record(prototype) | ({"options": identity(prototype)} if identity(prototype) else {})
    fields = {"after": after, "calibration": {**record, "method_source": prototype.source}, **decision}
    plan = Plan.keeping_all(
        method, prototype.granularity, request, checkpoint.shape, source=checkpoint.digest, **fields
    )
    return plan if prototype.granularity == "sparse" else carry_masks(plan, checkpoint.masks)


def _allocate(
    method: Method,
    checkpoint: Checkpoint,
    target: Target,
    inputs: Calibration | ImageSamples | None,
    batch: int | None,
    device: str,
    dtype: torch.dtype,
    workspace: Workspace,
    key: str,
) -> tuple[dict[str, int] | None, dict[str, Any]]:
    """Allocate the zeros of a sparse method, with a walk of its own; return them and what the summary says of them."""
    if not isinstance(method, WeightMethod) or not target.allocates:
        return None, {}
    where = target.allocation_field
    if checkpoint.masks:
        raise UserError(f"{where}: {checkpoint.directory} has masks already; prune the parent")
    if isinstance(inputs, ImageSamples):
        raise UserError(f"{where}: reads text alone; name text as `calibration`")
    place = {"store": workspace.store(f"{key}-allocation"), "journal": workspace.journal(f"{key}-allocation")}
    windows = inputs and inputs.windows
    walk = BlockWalk(checkpoint, windows, batch=batch, device=device, dtype=dtype, label="allocate zeros", **place)
    zeros = allocate_zeros(method, walk, target)
    ratios = ratios_by_layer(walk, zeros)
    notify(f"{where}: zeros by layer, in percent: {describe_ratios(ratios)}")
    summary: dict[str, Any] = {"name": target.allocation_name, "ratios": ratios}
    if windows is not None:
        shape, context = checkpoint.shape, windows.shape[1]
        summary["flops"] = allocation_flops(shape, method, windows.numel(), context, target.allocation)
        summary["tokens"] = round(summary["flops"] / shape.forward_flops(context))
    return zeros, {"allocation": summary}


def describe_ratios(ratios: Sequence[float]) -> str:
    """Ratios of the layers in percent, from the first to the last."""
    return " ".join(f"{100 * ratio:.1f}" for ratio in ratios)


def scores_identity(
    checkpoint: Checkpoint,
    method: str,
    target: Target,
    calibration: Calibration | None,
    *,
    options: Mapping[str, Any] | None = None,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any] | None:
    """Identify the scores that :func:`make_plan` computes for the same arguments, to the last bit.

    Returns:
        Plain values, equal where one journal serves; None where keeping it would not pay: masks and weights are as
        large as the model and serve one plan, and accuracies on a task are in no journal.

    Raises:
        UserError: as :func:`make_plan`.
    """
    prototype = get_method(method, options)
    if isinstance(prototype, WeightMethod) or task_of(prototype):
        return None
    target = complete_target(target, checkpoint.shape, prototype, method)
    windows = calibration.windows if calibration and reads_text(prototype) else None
    if windows is not None:
        batch = batch or default_batch(checkpoint.family, windows.shape[1], device)
    return {
        "source": checkpoint.digest,
        "method": method,
        "options": identity(prototype),
        "journal": _journal_key(prototype, target, checkpoint.shape, target.shape(checkpoint.shape, prototype, method)),
        "calibration": token_hash(windows.numpy()) if windows is not None else None,
        "batch": batch,  # decides how sums are rounded, as the device does
        "device": torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _journal_key(method: Method, target: Target, before: Shape, after: Shape) -> str:
    """Name the journal of a scoring: equal for targets that share all scores."""
    if isinstance(method, WeightMethod):
        tail = f"-{target.allocation_name}" if target.allocates else ""
        return f"weights-{target.pattern or target.ratio}{tail}".replace(":", "of").replace(" ", "-")
    if isinstance(method, RemovalMethod):
        count = before.layers - after.layers
        return f"greedy-{count}" if method.greedy else f"removal-{count if method.contiguous else 1}"
    if isinstance(method, ExpertMethod):
        return "experts" if target.propagate == "unpruned" else f"experts-pruned-{after.experts}"
    if isinstance(method, WidthMethod):
        spaces = "-".join(target.spaces(method))
        if method.sequential and target.allocation == "uniform":
            sizes = "-".join(str(after.units(space)) for space in target.spaces(method))
            return f"width-{spaces}-{sizes}"
        return f"width-{spaces}"
    return "layers"


def check_config(checkpoint: Checkpoint, after: Shape) -> None:
    """Refuse a shape that transformers will not open, before anything is scored."""
    fields = {"after": after, "keep_layers": torch.arange(after.layers)}
    cut_config(checkpoint, Plan.keeping_all("", "width", {}, checkpoint.shape, **fields))


def _check_finite(checkpoint: Checkpoint, *, whole: bool) -> None:
    """Refuse NaN and infinity in the tensors outside the blocks, or in all: the block walk checks the others."""
    for name in checkpoint.tensors() if whole else checkpoint.outer_tensors():
        checkpoint.check_finite(name, checkpoint.tensor(name))


def removed_shares(plan: Plan) -> dict[str, Any]:
    """Shares of the model that a plan removes, beside the request.

    Returns:
        ``asked``: the requested ratio, None for a shape or a pattern; ``of``: the parameters that it counts (``total``,
        ``non_embedding`` or ``block_weights``); the shares removed, ``total``, ``non_embedding`` and, for masks,
        ``block_weights``, for experts ``experts``; ``drift``: the share of that kind less the requested ratio.
    """
    ratio, of = plan.request.get("ratio"), plan.request.get("of")
    shares = plan.removed()
    if plan.granularity == "sparse":
        shares["block_weights"] = plan.zeroed / plan.before.block_weights
    if plan.granularity == "experts":
        shares["experts"] = 1 - plan.after.experts / plan.before.experts
    return {"asked": ratio, "of": of, **shares, "drift": None if ratio is None else shares[of or ""] - ratio}


def runtimes_of(checkpoint: Checkpoint, plan: Plan) -> tuple[Support, ...]:
    """Which runtimes compute what the plan makes of a checkpoint."""
    before = layer_kinds(checkpoint.config)
    kinds = tuple(before[layer] for layer in plan.keep_layers.tolist()) if before else ()
    return check_runtimes(Traits(plan.after, kinds, plan.before, bool(checkpoint.whole), before))


def write_pruned(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    ancestry: Ancestry | None = None,
    repository: str | None = None,
    last: tuple[Checkpoint, Plan] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut the checkpoint to the plan and write it, the plan, the files beside the weights and a card into ``out``.

    Args:
        out: an existing directory.
        ancestry: of the model that was pruned; None for what the checkpoint's own files say.
        repository: where it will be on the Hub; None if it stays on disk.
        last: what the weights come from, after several steps: the model before the last one, and the plan of that step.
        measured: of a latency goal, what :func:`secateur.pruning.latency.measure_latency` returns.

    Returns:
        The content of ``plan.json``.
    """
    goal = reached(plan, measured)
    content, zeros = plan.save(out), ZeroCount()
    share = removed_shares(plan)
    ancestry = ancestry or Ancestry.read(checkpoint.directory)
    change = family_change(plan.before, plan.after)
    if change:
        notify(f"{plan.method}: {change}")
    last = last or (checkpoint, plan)
    write_checkpoint(
        out,
        cut_config(*last),
        cut_tensors(*last, zeros),
        provenance={
            "kind": "pruned",
            "method": plan.method,
            "ratio": share,
            "plan": content["fingerprint"],
            "source": plan.source,
            "calibration": plan.calibration,
            **{key: plan.summary[key] for key in ("allocation", "reconstruction", "iterations") if key in plan.summary},
            **({"goal": goal} if goal else {}),
        },
        card=model_card(
            f"{ancestry.subject(plan.before)}, pruned with {plan.method}",
            ancestry,
            [
                *_describe_pruning(plan, share),
                *([f"- reached: {describe_reached(goal)}"] if goal else []),
                *([f"- family: {change}"] if change else []),
                f"- runs in: {describe_runtimes(runtimes_of(checkpoint, plan), sparse=bool(plan.masks))}",
            ],
            tags=("pruning", plan.method),
            repository=repository,
            image_text=checkpoint.whole is not None,
        ),
    )
    copy_companions(checkpoint.directory, out)
    zeros.warn(checkpoint.directory, UNMASKED)
    return content


def _describe_pruning(plan: Plan, share: dict[str, Any]) -> list[str]:
    """The lines of the card about the method, what it removed, and what that saves."""
    method = (
        f"**{plan.method}** ({'; '.join([plan.granularity, *filter(None, [plan.calibration.get('method_source')])])})"
    )
    sparse = plan.granularity == "sparse"
    lines = [
        f"Pruned with {method} by secateur, asked for {describe_target(plan.request)}: {plan.summary['detail']}.",
        "",
        f"- {'set to zero' if sparse else 'removed'}: {percent(share['total'])} of all parameters, "
        f"{percent(share['non_embedding'])} of those outside the embeddings",
    ]
    if sparse:
        lines.append(
            f"- sparsity: {percent(share['block_weights'])} of the weights of the blocks' linears; zeros are stored as "
            "any other weight, so the file is as large as before; `plan.safetensors` holds the masks"
        )
        if "allocation" in plan.summary:
            allocation = plan.summary["allocation"]
            ratios = describe_ratios(allocation["ratios"])
            lines.append(f"- allocation: {allocation['name']}; zeros by layer, in percent: {ratios}")
    elif plan.padded:
        lines.append(
            "- layers keep different numbers of units: zeros fill them up to the widest, and take memory as well"
        )
    else:
        lines.append(f"- size: {count(plan.after.total)} parameters instead of {count(plan.before.total)}")
    if plan.after.experts:
        active = count(plan.after.active_parameters)
        change = f" instead of {count(plan.before.active_parameters)}"
        changes = plan.after.active_parameters != plan.before.active_parameters
        lines.append(f"- active: a token uses {active} parameters{change if changes else ', as many as before'}")
    if "routing" in plan.summary:
        lines.append(f"- routing of the calibration text, by expert: {describe_routing(plan.summary['routing'])}")
    if plan.masks and not sparse:
        lines.append("- the masks of the model that was cut are kept in `plan.safetensors`, as far as it was kept")
    text = "none, no text was read"
    if plan.calibration["source"]:
        text = f"{plural(plan.calibration['tokens'], 'token')} of {short_source(plan.calibration['source'])}"
    if "iterations" in plan.summary:
        lines.append(f"- steps: {describe_steps(plan.request, plan.summary)}")
    if "reconstruction" in plan.summary:
        lines.append(f"- reconstructed: {describe_reconstruction(plan.summary['reconstruction'])}")
    return [
        *lines,
        f"- shape: {plan.after}",
        f"- calibration: {text}",
        "- not retrained; `plan.json` and `plan.safetensors` hold the scores and the selection",
    ]
