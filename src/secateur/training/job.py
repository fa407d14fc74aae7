"""Run a train request: check, place the model, train on exact tokens, write the checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import distributed
from secateur.config import fingerprint, identity
from secateur.data.domains import document_stream
from secateur.data.shards import TokenStore
from secateur.data.tokenizer_match import check_encoded_for
from secateur.errors import RunError, UserError
from secateur.evaluation.loss import Protocol
from secateur.evaluation.token_windows import check_shards, open_shards
from secateur.files import require_new_directory, shared_directory, write_json
from secateur.formatting import count, plural, scientific
from secateur.hub import check_token, create_repository, local_checkpoint, upload
from secateur.memory import ResourceUse, track_resources
from secateur.model.card import Ancestry
from secateur.model.checkpoint import Checkpoint, max_positions, skeleton
from secateur.model.companions import copy_companions
from secateur.model.config_spelling import with_dtype
from secateur.model.plan import JSON_FILE, TENSOR_FILE
from secateur.model.shapes import teacher_flops
from secateur.progress import notify
from secateur.runtime import environment, pick_device, pick_dtype
from secateur.training.adapter import announce_adapter, check_adapter, training_flops
from secateur.training.batches import Data, Slice
from secateur.training.checkpoints import FINISHED
from secateur.training.distill import Distillation, LogitsDistillation, check_logits, check_teacher
from secateur.training.heldout import heldout_loss
from secateur.training.init import stored_weights
from secateur.training.loop import RunOptions, train_loop
from secateur.training.masks import Masks
from secateur.training.metrics import Metrics, check_trackers, open_trackers
from secateur.training.objective import Objective
from secateur.training.origin import Origin, Start, open_origin
from secateur.training.output import trained_card, write_trained
from secateur.training.parallel import Execution, TrainModule, place_model, place_teacher
from secateur.training.recipe import FEW_STEPS, Distill, few_steps
from secateur.training.request import TrainRequest
from secateur.training.routing import balance_of, train_routers_alone
from secateur.training.teacher_logits import TeacherLogits, open_logits
from secateur.training.throughput import Meter, Peak, peak_of
from secateur.training.watchdog import stop_on_signals

__all__ = ["Trained", "distillation", "train", "train_model", "training_slice"]


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint. ``os.fspath`` gives its directory, so that it serves wherever a path does."""

    path: Path
    result: dict[str, Any]  #: ``curve``, ``tokens``, ``targets`` and ``steps`` of the run
    flops: float  #: of the run, a teacher's included
    teacher_flops: float | None  #: None without a teacher
    meter: Meter  #: tokens and seconds of this process's steps
    peak: Peak  #: what MFU is measured against
    use: ResourceUse  #: time and memory of the run

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Tokens, held-out loss, training loss and learning rate of each point."""
        return self.result["curve"]

    @property
    def heldout_loss(self) -> float | None:
        """Held-out loss at the end, nats per token; None without a held-out split."""
        return self.curve[-1]["loss"]

    @property
    def speed(self) -> float | None:
        """Tokens a second; None where no step was run."""
        return self.meter.tokens / self.meter.seconds if self.meter.seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where no step was run."""
        meter = self.meter
        return self.speed * meter.flops_per_token / meter.peak if self.speed and meter.peak else None

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur train --json`` prints them."""
        return {
            "out": str(self.path),
            "tokens": self.result["tokens"],
            "targets": self.result["targets"],
            "steps": self.result["steps"],
            "heldout_loss": {"before": self.curve[0]["loss"], "after": self.heldout_loss},
            "curve": self.curve,
            "flops": self.flops,
            **({} if self.teacher_flops is None else {"teacher_flops": self.teacher_flops}),
            "tokens_per_second": self.speed,
            "mfu": self.mfu,
            "peak_flops": {"flops": self.peak.flops, "source": self.peak.source},
            "seconds": self.use.seconds,
            "memory": self.use.memory,
            "device_memory": self.use.device,
        }


def train_model(
    start: Start,
    data: Data,
    *,
    execution: Execution,
    objective: Objective | None,
    protocol: Protocol | None,
    points: int,
    options: RunOptions,
) -> tuple[TrainModule, dict[str, Any]]:
    """Place a model and train it on every token of ``data``; all processes together.

    Args:
        objective: of distillation, the teacher in its place; None for the language-model loss.
        protocol: the windows of the held-out loss; None without one.
        points: measurements of it after the start.

    Returns:
        The trained module, and the result of :func:`secateur.training.loop.train_loop`.
    """
    module = place_model(start.model, start.weights, execution, objective)
    start.report()
    batch = data.recipe.micro_batch
    result = train_loop(
        module,
        data,
        masks=start.masks,
        measure=lambda model: heldout_loss(model, protocol, batch) if protocol else None,
        points=points,
        options=options,
    )
    Masks(module.model, start.masks).check()
    return module, result


def distillation(spec: Distill, teacher: Checkpoint, execution: Execution) -> Distillation:
    """The objective of distilling from ``teacher``, with the teacher in its place."""
    model = skeleton(teacher.config, teacher.directory)
    return Distillation(spec, place_teacher(model, stored_weights(teacher), execution))


def train(request: TrainRequest) -> Trained:
    """Train and write the checkpoint ``out``; all processes together.

    What can fail without reading weights fails first, the cheapest first.

    Raises:
        UserError: if the data, the model and the request do not fit together.
        RunError: if the run broke or was stopped; what it has saved stays.
    """
    out, recipe = Path(request.out), request.recipe
    check_token(request.push_to_hub)
    device = pick_device(request.device)
    dtype = "bfloat16" if pick_dtype(request.dtype, device) is torch.bfloat16 else "float32"
    execution = Execution(device, dtype, request.replicas, request.recompute, request.compile)
    store = open_shards(request.data, "data")
    origin = open_origin(request, dtype)
    data = training_slice(request, store, origin)
    _check_adapter(request, origin)
    if request.only == "router" and not origin.shape.experts:
        raise UserError(f"`only`: router: {origin.directory} is no mixture of experts; leave it out")
    logits = open_logits(request.teacher)
    teacher = None if logits else _open_teacher(request, origin)
    if logits:
        check_logits(logits, request.distill, data, store.fingerprint, origin.shape, origin.directory)
        data = dataclasses.replace(data, teacher=logits)
    protocol = _heldout_protocol(store, request.heldout_windows, recipe.sequence)
    require_new_directory(out)
    _check_outside(out, store.folder, *(c.directory for c in (origin.checkpoint, teacher) if c))
    _check_outside(out, *([logits.folder] if logits else []))
    check_trackers(request.track)
    objective = _objective_identity(request.distill, teacher, logits)
    run_identity = {
        **origin.identity,
        "data": store.fingerprint,
        "slice": [data.start, data.stop],
        "recipe": identity(recipe),
        "dtype": dtype,
        "evaluation": {"points": request.points, "protocol": protocol.record() if protocol else None},
        **({"objective": objective} if objective else {}),
        **({"keep_zeros": True} if request.keep_zeros else {}),
        **({"only": request.only} if request.only else {}),
        **({"adapter": identity(request.adapter)} if request.adapter else {}),
    }
    peak = peak_of(device, dtype)
    teaching = teacher_flops(teacher.shape, data.tokens, recipe.sequence) if teacher else None
    sparse = bool(origin.masks) or request.keep_zeros
    flops = training_flops(request.adapter, origin.shape, data.tokens, recipe, sparse=sparse) + (teaching or 0.0)
    _announce(data, origin, teacher or logits, flops, execution, peak)
    announce_adapter(request.adapter, origin.shape, sparse=sparse)
    data.report_targets()
    _warn_of_few_steps(data)
    create_repository(request.push_to_hub)
    directories = shared_directory(
        out, run_identity, "what to train, and how", resume=True, progress_files=FINISHED, labels=_RESUME_LABELS
    )
    meter = Meter(flops / data.tokens, peak.flops * distributed.world_size())
    with stop_on_signals() as stop, track_resources(device) as use, directories as (fresh, work):
        if request.keep_zeros:
            origin = origin.mask_zeros(work / "masks")
        names = (out.name, fingerprint(run_identity)[:16])
        trackers = open_trackers(request.track, work, *names) if distributed.is_main() else ()
        options = RunOptions(
            folder=work / "checkpoints",
            label=f"train {out.name}",
            save_every=request.save_every,
            save_minutes=request.save_minutes,
            keep=request.keep,
            background=device.startswith("cuda"),
            metrics=Metrics(work / "metrics.jsonl" if distributed.is_main() else None, trackers),
            meter=meter,
            stop=stop,
        )
        try:
            start = origin.start(recipe)
            if request.only == "router":
                train_routers_alone(start.model)
            if request.adapter:
                from secateur.training.lora import add_adapter  # imported late: PEFT takes long to import

                start = add_adapter(start, request.adapter, seed=recipe.seed)
            module, result = train_model(
                start,
                data,
                execution=execution,
                objective=_objective(request.distill, teacher, logits, execution),
                protocol=protocol,
                points=request.points,
                options=options,
            )
        except UserError as error:  # such as shards that are damaged further on: finished steps stay
            raise RunError(str(error), 2) from None
        options.metrics.close()
        facts = {"asked": run_identity, "result": result, "flops": flops}
        facts |= {"protocol": run_identity["evaluation"]["protocol"]}
        facts |= {} if teaching is None else {"teacher_flops": teaching}
        _write(fresh, origin, module, facts, request)
        for name in ("metrics.jsonl", *request.track) if distributed.is_main() else ():
            if (work / name).exists():
                shutil.move(work / name, fresh / name)
    upload(out, request.push_to_hub, without=request.track)  # a tracker's files name the machine
    return Trained(out, result, flops, teaching, meter, peak, use)


def _objective_identity(
    spec: Distill, teacher: Checkpoint | None, logits: TeacherLogits | None
) -> dict[str, Any] | None:
    """What a run learns from besides the tokens; None for the language-model loss."""
    if logits:
        return {**identity(spec), "teacher": logits.manifest.teacher, "logits": logits.fingerprint}
    return {**identity(spec), "teacher": teacher.digest} if teacher else None


def _objective(
    spec: Distill, teacher: Checkpoint | None, logits: TeacherLogits | None, execution: Execution
) -> Objective | None:
    """The loss with its teacher in place; None for the language-model loss."""
    if logits:
        return LogitsDistillation(spec)
    return distillation(spec, teacher, execution) if teacher else None


#: fields of a request by the keys that identify an unfinished run
_RESUME_LABELS = {
    "weights": "`init`",
    "config": "`init` or `like`",
    "masks": "the masks of `init` or `like`",
    "data": "`data`",
    "slice": "`tokens` or `skip`",
    "recipe": "`recipe`",
    "dtype": "`dtype`",
    "evaluation": "`points` or `heldout_windows`",
    "keep_zeros": "`keep_zeros`",
    "only": "`only`",
    "adapter": "`adapter`",
    "objective": "`teacher`, `temperature`, `alpha` or `top_k`",
}


def _check_adapter(request: TrainRequest, origin: Origin) -> None:
    """Check that the adapter of the request, if it has one, fits the model.

    Raises:
        UserError: naming the target or the linear at fault.
    """
    if request.adapter is None:
        return
    if origin.checkpoint and origin.checkpoint.whole:
        raise UserError("`adapter`: image-text models get none; leave it out, and the language model is trained whole")
    check_adapter(request.adapter, origin.shape)


def _check_outside(out: Path, *folders: Path) -> None:
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{out}: lies in {folder}, which is read; name a directory outside it")


def training_slice(request: TrainRequest, store: TokenStore, origin: Origin | Checkpoint) -> Slice:
    """The tokens of the run.

    Raises:
        UserError: if there are not enough, or the model cannot take them.
    """
    recipe = request.recipe
    first, last, available = request.skip, request.skip + request.tokens, store.tokens("train")
    if last > available:
        raise UserError(
            f"`tokens`: {request.data} has {plural(available, 'token')}, not {first:,} to {last:,}; "
            f"lower `tokens` by {last - available:,}, or build a larger corpus"
        )
    check_shards(store, request.data, "data", origin.shape.vocabulary)
    check_encoded_for(origin.directory, store.tokenizer, request.data, "`data`")
    limit = max_positions(origin.config)
    if limit and recipe.sequence > limit:
        raise UserError(
            f"`recipe`: sequence is {recipe.sequence}, but the model has {limit} positions; set sequence={limit}"
        )
    return Slice(store, first, last, recipe)


def _open_teacher(request: TrainRequest, origin: Origin) -> Checkpoint | None:
    """Open the teacher; None where the request names none.

    Raises:
        UserError: if there is no such checkpoint, or it cannot teach the model.
    """
    if request.teacher is None:
        return None
    checkpoint = Checkpoint(local_checkpoint(request.teacher))
    check_teacher(checkpoint, origin.shape, origin.directory, request.recipe.sequence)
    return checkpoint


def _heldout_protocol(store: TokenStore, windows: int, seqlen: int) -> Protocol | None:
    """The windows that the held-out loss is measured on; None where the data holds none out."""
    if "heldout" not in store.manifest.splits:
        notify("the data has no held-out split: no held-out loss is measured")
        return None
    stop = min(windows * seqlen, store.tokens("heldout"))
    if store.targets("heldout", 0, 0) is not None:  # attention stays within conversations, so these must be known
        return Protocol.of_stream(document_stream(store, "heldout", 0, stop), seqlen, "held-out documents")
    return Protocol.of_stream(store.read("heldout", 0, stop), seqlen, "held-out documents")


def _announce(
    data: Slice,
    origin: Origin,
    teacher: Checkpoint | TeacherLogits | None,
    flops: float,
    execution: Execution,
    peak: Peak,
) -> None:
    sparse = f", {plural(len(origin.masks), 'masked matrix', 'masked matrices')}" if origin.masks else ""
    source = f"the likeliest {teacher.manifest.top_k} ids" if isinstance(teacher, TeacherLogits) else ""
    source = count(teacher.shape.total) if isinstance(teacher, Checkpoint) else source
    distilled = f", distilled from {source}" if source else ""
    processes = distributed.world_size()
    notify(
        f"{count(origin.shape.total)} parameters{sparse}{distilled}, {plural(data.tokens, 'token')} in "
        f"{plural(data.steps, 'step')}, {scientific(flops)} FLOPs; {plural(processes, 'process', 'processes')} on "
        f"{execution.device}, {execution.dtype}"
        f"{'' if origin.dtype_name == execution.dtype else f', stored in {origin.dtype_name}'}; "
        f"MFU is of {scientific(peak.flops * processes)} FLOPs a second ({peak.source})"
    )
    balance = balance_of(origin.config) if origin.shape.layers_with("experts") else 0
    if balance:
        notify(f"loss: plus {balance:g} times the balance of the routers (router_aux_loss_coef in config.json)")


def _warn_of_few_steps(data: Slice) -> None:
    recipe = data.recipe
    few = few_steps(data.tokens, recipe.tokens_per_step, recipe.sequence)
    if few is None:
        return
    steps, size, more = few
    advice = f"tokens_per_step={size} would give {more}" if more > steps else "a shorter sequence would give more"
    notify(
        f"`recipe`: {plural(data.tokens, 'token')} in {plural(steps, 'optimizer step')} of "
        f"{recipe.tokens_per_step:,}, fewer than {FEW_STEPS}, which is few for a warm-up and a decay; {advice}"
    )


def _write(out: Path, origin: Origin, module: TrainModule, facts: dict[str, Any], request: TrainRequest) -> None:
    """Write the trained model as a checkpoint, or its adapter; all processes give their parts, the first one writes."""
    result, objective, adapter = facts["result"], facts["asked"].get("objective"), request.adapter
    provenance = origin.provenance
    history = {
        "init": origin.kind,
        **{k: v for k, v in result.items() if k != "curve"},
        **({"objective": objective} if objective else {}),
        **({"adapter": identity(adapter)} if adapter else {}),
        **({"origin": provenance} if provenance else {}),
    }
    ancestry = Ancestry.read(origin.directory, origin.repository) if origin.checkpoint else None
    if adapter:
        from secateur.training.adapter_output import write_adapter  # imported late: PEFT takes long to import

        base = origin.repository or str(origin.directory.resolve())
        folder = out / "adapter" if request.merge else out
        write_adapter(folder, module.model, adapter, base, ancestry, history, result, masks=bool(origin.masks))
    if adapter and not request.merge:
        if distributed.is_main():
            write_json(out / "train.json", {**facts, "versions": environment()})
        return
    write_trained(
        out,
        module,
        with_dtype(origin.raw_config, origin.dtype_name),
        origin.dtype_of,
        provenance={"kind": "trained", **history},
        card=trained_card(
            origin.shape,
            result,
            flops=facts["flops"],
            ancestry=ancestry,
            provenance=provenance,
            masks=origin.masks,
            objective=objective,
            adapter=adapter,
            repository=request.push_to_hub,
            image_text=bool(origin.checkpoint and origin.checkpoint.whole),
        ),
        image_text=origin.checkpoint.image_text if origin.checkpoint else None,
        remedy="the steps are saved: repeat the command with `save_dtype` bfloat16 or float32, and it only writes",
    )
    if not distributed.is_main():
        return
    copy_companions(origin.directory, out)
    for name in (JSON_FILE, TENSOR_FILE) if origin.masks else ():  # so that the masks hold in later runs as well
        shutil.copyfile(origin.plan / name, out / name)
    write_json(out / "train.json", {**facts, "versions": environment()})
