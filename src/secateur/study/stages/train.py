"""The stage that trains: first weights, masks, objective, the loop, and what is left behind."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from secateur import distributed
from secateur.config import from_identity, parse
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import DivergenceError
from secateur.files import read_json
from secateur.model.card import Ancestry
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.companions import copy_companions
from secateur.model.config_spelling import with_dtype
from secateur.model.plan import JSON_FILE, Plan, load_masks
from secateur.model.shapes import Shape
from secateur.model.surgery import cut_config
from secateur.progress import notify
from secateur.pruning.pattern import Pattern
from secateur.runtime import pick_device
from secateur.study.stage import Stage
from secateur.study.stages.controls import each_matrix, permuted_mask, random_mask, redrawn_linears, shuffle_weights
from secateur.study.stages.inputs import check_parents, corpus_tokens, holdout_protocol, model_of
from secateur.study.stages.teach import LOGITS
from secateur.study.store import Store
from secateur.training.adapter import Adapter
from secateur.training.batches import Slice
from secateur.training.distill import LogitsDistillation, check_logits, check_teacher
from secateur.training.init import fresh_config, fresh_weights, stored_weights
from secateur.training.job import distillation, train_model
from secateur.training.loop import RunOptions
from secateur.training.objective import Objective
from secateur.training.origin import Start
from secateur.training.output import trained_card, write_trained
from secateur.training.parallel import Execution
from secateur.training.recipe import Distill, Recipe
from secateur.training.teacher_logits import TeacherLogits
from secateur.training.watchdog import stop_on_signals

__all__ = ["train_stage"]

STATE = "state"  #: what a trunk leaves behind for the runs that continue it


def train_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Train on the stage's slice; all processes together.

    Returns:
        What :func:`secateur.training.loop.train_loop` does, with ``parameters`` and ``peak_rate``. Of a trial that
        diverged ``{"diverged": True}``: its rate has lost, and the study continues.

    Raises:
        DivergenceError: if the loss is no longer finite and the run is not a trial.
    """
    try:
        return _train(stage, store, work)
    except DivergenceError as error:
        if not stage.identity.get("trial"):
            raise
        notify(f"{error}; the other rates of the sweep continue")
        return {"diverged": True}


def _train(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    identity = stage.identity
    recipe = _recipe(stage, store)
    check_parents(stage, store, recipe.sequence)
    tokens = corpus_tokens(stage, store, stage.facts["shape"].vocabulary)
    start, stop = identity["slice"]
    evaluation = identity["evaluation"]
    execution = _execution(stage)
    data = Slice(tokens, start, stop, recipe)
    data.report_targets()
    begin = _start(stage, store, recipe)
    objective, logits = _objective(stage, store, data, execution)
    adapter = parse(Adapter, identity["adapter"], origin="adapter") if "adapter" in identity else None
    if adapter:
        from secateur.training.lora import add_adapter  # imported late: PEFT takes long to import

        begin = add_adapter(begin, adapter, seed=recipe.seed)
    with stop_on_signals() as signal:
        module, result = train_model(
            begin,
            dataclasses.replace(data, teacher=logits),
            execution=execution,
            objective=objective,
            protocol=holdout_protocol(tokens, evaluation["windows"], recipe.sequence, evaluation["skip"]),
            points=evaluation["points"],
            options=RunOptions(
                folder=work / "checkpoints",
                label=stage.name,
                origin=_origin(stage, store),
                background=execution.device.startswith("cuda"),
                stop=signal,
            ),
        )
    if identity.get("keep") == STATE and distributed.is_main():
        _keep_state(work)
    out = work / "model"
    if distributed.is_main():
        out.mkdir(exist_ok=True)
    dtype = getattr(torch, identity["dtype"])
    origin = begin.checkpoint
    provenance = origin.provenance if origin else None
    write_trained(
        out,
        module,
        with_dtype(begin.config, identity["dtype"]),
        lambda _: dtype,
        provenance={
            "kind": "trained",
            "init": identity["init"],
            "tokens": result["tokens"],
            "stage": stage.fingerprint,
            **({"adapter": identity["adapter"]} if adapter else {}),
            **({"origin": provenance} if provenance else {}),
        },
        card=trained_card(
            Shape.of_config(module.model.config, where=str(out)),
            result,
            ancestry=Ancestry.read(origin.directory) if origin else None,
            provenance=provenance,
            masks=begin.masks,
            objective=stage.identity.get("objective"),
            adapter=adapter,
            stage=stage.name,
            image_text=bool(origin and origin.whole),
        ),
        image_text=origin.image_text if origin else None,
    )
    if not distributed.is_main():
        return {}
    if origin:
        copy_companions(origin.directory, out)
    load_tokenizer(tokens.folder / "tokenizer").save_pretrained(out)
    shape = Checkpoint(out).shape
    counted = {"total": shape.total, "non_embedding": shape.non_embedding}
    return {**result, "parameters": counted, "peak_rate": recipe.peak_rate}


def _recipe(stage: Stage, store: Store) -> Recipe:
    """The stage's recipe; a rate that was swept for is the one that won."""
    raw = {**stage.identity["recipe"], "micro_batch": stage.runtime["micro_batch"]}
    if "rate" in stage.inputs:
        raw["peak_rate"] = read_json(store.folder(stage.inputs["rate"]) / "record.json")["result"]["peak_rate"]
    return from_identity(Recipe, raw, origin="recipe")


def _execution(stage: Stage) -> Execution:
    how = stage.runtime
    replicas = how["replicas"] if distributed.world_size() > 1 else 1
    return Execution(pick_device(how["device"]), stage.identity["dtype"], replicas, how["recompute"], how["compile"])


def _origin(stage: Stage, store: Store) -> Path | None:
    """The checkpoint that the stage continues."""
    if stage.identity["init"] != "continued":
        return None
    return store.folder(stage.inputs["model"]) / STATE


def _keep_state(work: Path) -> None:
    """Keep the last training checkpoint, which goes with the others when the stage is finished."""
    last = max((work / "checkpoints").glob("step-*"))
    shutil.rmtree(work / STATE, ignore_errors=True)
    shutil.copytree(last, work / STATE, copy_function=os.link)


def _objective(
    stage: Stage, store: Store, data: Slice, execution: Execution
) -> tuple[Objective | None, TeacherLogits | None]:
    """The loss, None for the language-model loss; and the teacher's log-probabilities if they are saved."""
    if "objective" not in stage.identity:
        return None, None
    spec = parse(Distill, stage.identity["objective"], origin="objective")
    corpus, student = store.folder(stage.inputs["corpus"]), stage.facts["shape"]
    if stage.inputs["teacher"].kind == "teach":
        logits = TeacherLogits(store.folder(stage.inputs["teacher"]) / LOGITS)
        check_logits(logits, spec, data, TokenStore(corpus).fingerprint, student, corpus / "tokenizer")
        return LogitsDistillation(spec), logits
    teacher = Checkpoint(model_of(stage, store, "teacher"))
    check_teacher(teacher, student, corpus / "tokenizer", data.recipe.sequence)
    return distillation(spec, teacher, execution), None


def _start(stage: Stage, store: Store, recipe: Recipe) -> Start:
    """The weights that the stage begins with, and the masks that it must keep."""
    init = stage.identity["init"]
    if init == "scratch":
        raw = _config(stage, store, recipe)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
        model = skeleton(config, store.folder(stage.inputs["corpus"]))
        return Start(model, fresh_weights(model, recipe.init, seed=recipe.seed), config=raw)
    weights = Checkpoint(model_of(stage, store, "model" if "model" in stage.inputs else "plan"))
    masks = _masks(stage, store)
    model = skeleton(weights.config, weights.directory)
    if init in ("pruned", "continued", "parent-continued"):
        return Start(model, stored_weights(weights), masks, config=weights.raw_config, checkpoint=weights)
    if init == "shuffled-weights":
        shuffle = shuffle_weights(stored_weights(weights), masks, recipe.seed)
        return Start(model, shuffle, masks, config=weights.raw_config, checkpoint=weights)
    pattern = _pattern(weights.directory)
    if init == "permuted":
        masks = each_matrix(permuted_mask, masks, weights.tensors(), recipe.seed, pattern)
    elif init == "random-mask":
        masks = each_matrix(random_mask, masks, weights.tensors(), recipe.seed, pattern)
    draw = fresh_weights(model, recipe.init, seed=recipe.seed)
    if init == "redrawn-linears":
        draw = redrawn_linears(model, draw, stored_weights(weights))
    return Start(model, draw, masks, config=weights.raw_config)


def _masks(stage: Stage, store: Store) -> dict[str, Tensor]:
    """Those of the plan that the stage rests on, through the runs that it continues; a parent may have its own."""
    at = stage
    while at.kind == "train" and "plan" not in at.inputs:
        if "model" not in at.inputs:
            return {}
        at = at.inputs["model"]
    folder = store.folder(at.inputs.get("plan", at)) / "model"
    if at.kind in ("fetch", "select") and not (folder / JSON_FILE).is_file():
        return {}  # a dense parent
    return load_masks(folder)


def _pattern(directory: Path) -> Pattern | None:
    text = read_json(directory / JSON_FILE)["asked"].get("pattern")
    return Pattern.parse(text) if text else None


def _config(stage: Stage, store: Store, recipe: Recipe) -> dict[str, Any]:
    """The content of config.json of a model of the stage's shape: a Llama, or what its parent would be cut to."""
    shape = stage.facts["shape"]
    if "like" not in stage.inputs:
        tokenizer = load_tokenizer(store.folder(stage.inputs["corpus"]) / "tokenizer")
        config = fresh_config(shape, context=recipe.sequence, tokenizer=tokenizer, **stage.identity.get("config", {}))
        return {**config.to_diff_dict(), "model_type": config.model_type}
    parent = Checkpoint(model_of(stage, store, "like"))
    fields = {"after": shape, "keep_layers": torch.arange(shape.layers)}
    return cut_config(parent, Plan.keeping_all("", "width", {}, parent.shape, **fields))
