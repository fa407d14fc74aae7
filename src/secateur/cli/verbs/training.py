"""train: a model on an exact number of tokens, from fresh weights or a checkpoint's."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.cli.verbs.answer import Answer
from secateur.cli.verbs.directories import shared_directory
from secateur.config import fingerprint, identity, load_yaml, parse, parse_value
from secateur.data.shards import TokenStore
from secateur.errors import RunError, UserError
from secateur.evaluation.loss import Protocol
from secateur.files import check_free, write_json
from secateur.formatting import byte_size, count, scientific
from secateur.memory import ResourceUse, track_resources
from secateur.model.checkpoint import (
    Checkpoint,
    copy_tokenizer,
    max_positions,
    read_config,
    skeleton,
)
from secateur.model.plan import JSON_FILE, TENSOR_FILE, load_masks
from secateur.model.shapes import Shape, teacher_flops, train_flops
from secateur.progress import clock_time, notify
from secateur.runtime import environment, pick_device, pick_dtype
from secateur.training.batches import Slice
from secateur.training.checkpoints import FINISHED
from secateur.training.distill import Distill, Distillation, check_teacher
from secateur.training.heldout import heldout_loss
from secateur.training.init import fresh_weights, stored_weights
from secateur.training.loop import RunOptions
from secateur.training.loop import train_loop as run
from secateur.training.metrics import Metrics, check_trackers, open_trackers
from secateur.training.output import write_trained
from secateur.training.parallel import Execution, TrainModule, place_model, place_teacher
from secateur.training.recipe import Recipe
from secateur.training.throughput import Meter, Peak, peak_of
from secateur.training.watchdog import stop_on_signals

__all__ = ["train"]


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    directory: Path  #: of the configuration and the tokenizer
    raw_config: dict[str, Any]
    config: Any
    shape: Shape
    checkpoint: Checkpoint | None  #: of the weights; None for fresh ones
    masks: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """Where the weights come from, in a word."""
        return "checkpoint" if self.checkpoint else "redrawn" if self.masks else "random"

    @property
    def identity(self) -> dict[str, Any]:
        """What of it changes the result."""
        plan = self.directory / JSON_FILE
        weights = self.checkpoint.digest if self.checkpoint else "scratch"
        return {"weights": weights, "config": self.raw_config, "masks": plan.read_text() if self.masks else None}


@dataclass(frozen=True)
class Teacher:
    """Whom a run distils from, and how."""

    checkpoint: Checkpoint
    spec: Distill

    @property
    def identity(self) -> dict[str, Any]:
        """What of it changes the result."""
        return {**identity(self.spec), "teacher": self.checkpoint.digest}

    def objective(self, execution: Execution) -> Distillation:
        """What is minimised, with the teacher in its place."""
        skin = skeleton(self.checkpoint.config, self.checkpoint.directory)
        return Distillation(self.spec, place_teacher(skin, stored_weights(self.checkpoint), execution))


def train(arguments: Namespace) -> Answer:
    """``secateur train OUT``. What can fail without reading weights fails first, the cheapest first."""
    out = Path(arguments.out)
    recipe = _recipe(arguments)
    device = pick_device(arguments.device)
    dtype = "bfloat16" if pick_dtype(arguments.dtype, device) is torch.bfloat16 else "float32"
    execution = Execution(device, dtype, arguments.replicas, arguments.recompute, arguments.compile)
    store = _store(arguments.data)
    start = _start(arguments)
    data = _slice(arguments, store, recipe, start)
    teacher = _teacher(arguments, start, recipe)
    protocol = _protocol(store, arguments.heldout_windows, recipe.sequence)
    check_free(out)
    read = [c.directory for c in (start.checkpoint, teacher and teacher.checkpoint) if c]
    for inside in (store.folder, *read):
        if out.resolve().is_relative_to(inside.resolve()):
            raise UserError(f"{out}: lies in {inside}, which is read; name a directory outside it")
    check_trackers(arguments.track or ())
    asked = {
        **start.identity,
        "data": store.fingerprint,
        "slice": [data.start, data.stop],
        "recipe": identity(recipe),
        "dtype": dtype,
        "evaluation": {"points": arguments.points, "protocol": protocol.record() if protocol else None},
        **({"objective": teacher.identity} if teacher else {}),
    }
    peak = peak_of(device, dtype)
    taught = teacher_flops(teacher.checkpoint.shape, data.tokens, recipe.sequence) if teacher else 0.0
    flops = train_flops(start.shape, data.tokens, recipe.sequence) + taught
    _announce(data, start, teacher, flops, execution, peak)
    directories = shared_directory(out, asked, "what to train, and how", resume=True, begun=FINISHED, words=_WORDS)
    with stop_on_signals() as stop, track_resources(device) as use, directories as (fresh, work):
        named = (out.name, fingerprint(asked)[:16])
        trackers = open_trackers(arguments.track or (), work, *named) if distributed.is_main() else ()
        house = RunOptions(
            folder=work / "checkpoints",
            label=f"train {out.name}",
            save_every=arguments.save_every,
            keep=arguments.keep,
            behind=device.startswith("cuda"),
            metrics=Metrics(work / "metrics.jsonl" if distributed.is_main() else None, trackers),
            meter=Meter(flops / data.tokens, peak.flops * distributed.world_size()),
            stop=stop,
        )
        model = skeleton(start.config, start.directory)
        objective = teacher.objective(execution) if teacher else None
        trainee = place_model(model, _weights(start, model, recipe), execution, objective)
        try:
            result = run(
                trainee,
                data,
                masks=start.masks,
                measure=lambda model: heldout_loss(model, protocol, recipe.micro_batch) if protocol else None,
                points=arguments.points,
                house=house,
            )
        except UserError as error:  # such as shards that are damaged further on: what has been done stays
            raise RunError(str(error), 2) from None
        house.metrics.close()
        facts = {"asked": asked, "result": result, "flops": flops, "protocol": asked["evaluation"]["protocol"]}
        facts |= {"teacher_flops": taught} if teacher else {}
        _write(fresh, start, trainee, facts, dtype)
        if distributed.is_main():
            for name in ("metrics.jsonl", *(arguments.track or ())):
                if (work / name).exists():
                    shutil.move(work / name, fresh / name)
    return (
        _answer(arguments, start, {**facts, "meter": house.meter}, use, peak) if distributed.is_main() else ({}, "", 0)
    )


#: what an unfinished run was asked for, as the command line has it
_WORDS = {
    "weights": "--init",
    "config": "--init or --like",
    "masks": "the masks of --init or --like",
    "data": "--data",
    "slice": "--tokens or --skip",
    "recipe": "--recipe or --set",
    "dtype": "--dtype",
    "evaluation": "--points or --heldout-windows",
    "objective": "--teacher, --temperature, --alpha or --top-k",
}


def _recipe(arguments: Namespace) -> Recipe:
    """The recipe of a file, with what was set besides."""
    raw = load_yaml(Path(arguments.recipe)) if arguments.recipe else {}
    if not isinstance(raw, dict):
        raise UserError(f"{arguments.recipe}: expected a mapping of keys to values, such as peak_rate: 1e-3")
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {text}: should be KEY=VALUE, such as peak_rate=1e-3")
        raw[key.strip()] = parse_value(value)
    if arguments.micro_batch:
        raw["micro_batch"] = arguments.micro_batch
    return parse(Recipe, raw, origin="recipe")


def _store(text: str) -> TokenStore:
    scheme, _, path = text.partition(":")
    if scheme != "shards" or not path:
        raise UserError(f"--data {text}: name shards:DIR, a folder that `secateur data SOURCE DIR` has written")
    if not (Path(path) / "manifest.json").is_file():
        raise UserError(f"--data {text}: holds no token shards; write them with `secateur data SOURCE {path}`")
    return TokenStore(Path(path))


def _start(arguments: Namespace) -> Start:
    """The model that was asked for.

    Raises:
        UserError: if there is no such checkpoint, or a shape is missing or given twice.
    """
    if arguments.init != "scratch":
        if arguments.like is not None:
            raise UserError(
                f"--like: the shape is that of --init {arguments.init}; leave it out, or use --init scratch"
            )
        checkpoint = Checkpoint(arguments.init)
        found = (checkpoint.directory, checkpoint.raw_config, checkpoint.config, checkpoint.shape, checkpoint)
        return Start(*found, _masks(checkpoint.directory))
    if arguments.like is None:
        raise UserError("--init scratch: a shape is needed; name a checkpoint or config.json of that shape with --like")
    directory = Path(arguments.like)
    directory = directory.parent if directory.name == "config.json" else directory
    if not (directory / "config.json").is_file():
        raise UserError(f"--like {arguments.like}: no config.json there; name a checkpoint or its config.json")
    raw, config, shape = read_config(directory / "config.json")
    return Start(directory, raw, config, shape, None, _masks(directory))


def _masks(directory: Path) -> Mapping[str, Tensor]:
    """The masks of a model that was pruned to a pattern or a share of its weights; they hold in training."""
    return load_masks(directory) if (directory / JSON_FILE).is_file() else {}


def _weights(start: Start, model: Any, recipe: Recipe) -> Callable[[str], Tensor]:
    if start.checkpoint:
        return stored_weights(start.checkpoint)
    return fresh_weights(model, std=recipe.init_std, seed=recipe.seed)


def _slice(arguments: Namespace, store: TokenStore, recipe: Recipe, start: Start) -> Slice:
    """The tokens of the run.

    Raises:
        UserError: if there are not enough, or the model cannot take them.
    """
    first, last, there = arguments.skip, arguments.skip + arguments.tokens, store.tokens("train")
    if arguments.tokens < 2:
        raise UserError("--tokens: one token predicts nothing; train on two or more")
    if last > there:
        raise UserError(
            f"--tokens: tokens {first:,} to {last:,} were asked for, but {arguments.data} has {there:,}; "
            f"lower --tokens by {last - there:,}, or build a larger corpus"
        )
    if store.vocabulary > start.shape.vocabulary:
        raise UserError(
            f"--data {arguments.data}: has ids up to {store.vocabulary - 1}, but the model's vocabulary is "
            f"{start.shape.vocabulary}; build the data with the model's tokenizer"
        )
    limit = max_positions(start.config)
    if limit and recipe.sequence > limit:
        raise UserError(f"--set sequence={recipe.sequence}: the model has {limit} positions; set sequence={limit}")
    return Slice(store, first, last, recipe)


def _teacher(arguments: Namespace, start: Start, recipe: Recipe) -> Teacher | None:
    """Whom to distil from.

    Raises:
        UserError: if there is no such checkpoint, it cannot teach the model, or an option is out of range or alone.
    """
    given = {name: getattr(arguments, name) for name in ("temperature", "alpha", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.teacher is None:
        for name in given:
            raise UserError(
                f"--{name.replace('_', '-')}: says how to distil; name whom to distil from with --teacher DIR"
            )
        return None
    spec = parse(Distill, given, origin="--teacher")
    checkpoint = Checkpoint(arguments.teacher)
    check_teacher(checkpoint, start.shape, start.directory, recipe.sequence)
    return Teacher(checkpoint, spec)


def _protocol(store: TokenStore, windows: int, seqlen: int) -> Protocol | None:
    """The windows that the held-out loss is measured on; None where the data holds none out."""
    if "heldout" not in store.manifest.splits:
        notify("the data has no held-out split: no held-out loss is measured")
        return None
    ids = store.read("heldout", 0, min(windows * seqlen, store.tokens("heldout")))
    return Protocol.of_stream(ids, seqlen, "held-out documents")


def _announce(
    data: Slice, start: Start, teacher: Teacher | None, flops: float, execution: Execution, peak: Peak
) -> None:
    sparse = f", {len(start.masks)} masked matrices" if start.masks else ""
    taught = f", distilled from {count(teacher.checkpoint.shape.total)}" if teacher else ""
    notify(
        f"{count(start.shape.total)} parameters{sparse}{taught}, {data.tokens:,} tokens in {data.steps:,} steps, "
        f"{scientific(flops)} FLOPs; {distributed.world_size()} process(es) on {execution.device}, {execution.dtype}; "
        f"MFU is of {scientific(peak.flops * distributed.world_size())} FLOPs a second ({peak.source})"
    )


def _write(out: Path, start: Start, trainee: TrainModule, facts: dict[str, Any], dtype: str) -> None:
    """The trained model as a checkpoint; all processes give their parts, the first one writes."""
    result = facts["result"]
    origin = "fresh weights" if start.checkpoint is None else f"the weights of {start.directory.name}"
    objective = facts["asked"].get("objective")
    taught = f", distilled at temperature {objective['temperature']:g}" if objective else ""
    line = f"Trained by secateur on {result['tokens']:,} tokens from {origin}{taught}."
    stored = getattr(torch, dtype)
    write_trained(
        out,
        trainee,
        {**{k: v for k, v in start.raw_config.items() if k != "torch_dtype"}, "dtype": dtype},
        lambda _: stored,
        provenance={
            "kind": "trained",
            "init": start.kind,
            **{k: v for k, v in result.items() if k != "curve"},
            **({"objective": objective} if objective else {}),
        },
        line=line,
    )
    if not distributed.is_main():
        return
    copy_tokenizer(start.directory, out)
    for name in (JSON_FILE, TENSOR_FILE) if start.masks else ():  # so that the masks hold in what follows as well
        shutil.copyfile(start.directory / name, out / name)
    write_json(out / "train.json", {**facts, "versions": environment()})


def _answer(arguments: Namespace, start: Start, facts: dict[str, Any], use: ResourceUse, peak: Peak) -> Answer:
    result, meter = facts["result"], facts["meter"]
    first, last = result["curve"][0]["loss"], result["curve"][-1]["loss"]
    speed = meter.tokens / meter.seconds if meter.seconds else None
    mfu = speed * meter.flops_per_token / meter.peak if speed else None
    answer = {
        "out": arguments.out,
        "tokens": result["tokens"],
        "targets": result["targets"],
        "steps": result["steps"],
        "heldout_loss": {"before": first, "after": last},
        "curve": result["curve"],
        "flops": facts["flops"],
        **{key: facts[key] for key in ("teacher_flops",) if key in facts},
        "tokens_per_second": speed,
        "mfu": mfu,
        "peak_flops": {"flops": peak.flops, "source": peak.source},
        "seconds": use.seconds,
        "memory": use.memory,
        "device_memory": use.device,
    }
    lines = [
        f"{arguments.out}: {result['tokens']:,} tokens in {result['steps']:,} steps, {result['targets']:,} targets"
    ]
    if last is not None:
        lines.append(f"held-out loss  {first:.4f} -> {last:.4f} nats a token")
    theirs = f", {scientific(facts['teacher_flops'])} of them the teacher's" if "teacher_flops" in facts else ""
    lines.append(f"FLOPs          {scientific(facts['flops'])}{theirs}")
    if speed:
        lines.append(f"speed          {speed:,.0f} tokens/s, MFU {mfu:.1%} ({peak.source})")
    told = [f"{byte_size(use.memory)} of memory"] if use.memory else []
    told += [f"{byte_size(use.device)} on the device"] if use.device else []
    lines.append(f"took           {', '.join([clock_time(use.seconds), *told])}")
    return answer, "\n".join(lines), 0
