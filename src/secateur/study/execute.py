"""What each kind of stage does. Each function reads its inputs' folders, writes its own and returns its result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.journal import Workspace
from secateur.checkpoint import Checkpoint, model_card, model_tensors, skeleton, write_checkpoint
from secateur.data.corpus import CorpusSpec, build_corpus
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import UserError
from secateur.evaluate.loss import Protocol, evaluate
from secateur.plan import load_masks
from secateur.progress import task
from secateur.prune import Calibration, make_plan, scores_identity, write_pruned
from secateur.shapes import Shape
from secateur.spec import parse
from secateur.study.stages import Stage
from secateur.study.store import Store
from secateur.target import Target
from secateur.train.batches import Slice
from secateur.train.init import fresh_weights, llama_config, stored_weights
from secateur.train.loop import Housekeeping, train
from secateur.train.masks import Masks
from secateur.train.measure import held_out_loss
from secateur.train.optim import Recipe
from secateur.train.parallel import Execution, Trainee, place

__all__ = ["run_stage"]


def run_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Do the stage's work in the folder ``work`` and return its result, plain values only."""
    return _KINDS[stage.kind](stage, store, work)


def _corpus(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    raw = {key: value for key, value in stage.identity.items() if key != "digest"}
    return build_corpus(parse(CorpusSpec, raw, origin="corpus"), work)


def _prune(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    asked = stage.identity
    checkpoint = Checkpoint(store.folder(stage.inputs["model"]) / "model")
    windows = _calibration_windows(stage, store)
    calibration = Calibration(windows, "the parent's training slice")
    pruning = (checkpoint, asked["method"], Target(ratio=asked["ratio"]), calibration)
    scores = scores_identity(*pruning)
    with store.scores(stage, scores) if scores else nullcontext(work / "checkpoints") as journals:
        plan = make_plan(*pruning, workspace=Workspace(journals))
    (work / "model").mkdir(exist_ok=True)
    content = write_pruned(checkpoint, plan, work / "model")
    return {key: content[key] for key in ("ratio", "before", "after", "calibration", "summary", "fingerprint")}


def _calibration_windows(stage: Stage, store: Store) -> Tensor:
    """Windows of the parent's slice, chosen by seed, in the order of the corpus."""
    asked = stage.identity
    start, stop = asked["slice"]
    length = asked["seqlen"]
    tokens = TokenStore(store.folder(stage.inputs["corpus"]))
    generator = torch.Generator().manual_seed(asked["calibration"]["seed"])
    order = torch.randperm((stop - start) // length, generator=generator)
    chosen = order[: asked["calibration"]["windows"]].sort().values.tolist()
    at = [start + window * length for window in chosen]
    return torch.stack([torch.from_numpy(tokens.read("train", i, i + length)) for i in at])


def _train(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    asked = stage.identity
    recipe = parse(Recipe, {**asked["recipe"], **stage.runtime}, origin="recipe")
    corpus = store.folder(stage.inputs["corpus"])
    tokens = TokenStore(corpus)
    start, stop = asked["slice"]
    if tokens.tokens("train") < stop:
        raise UserError(
            f"the corpus has {tokens.tokens('train'):,} training tokens, but the budgets need {stop:,}; "
            "give more text, or lower parent.tokens or retrain.tokens"
        )
    protocol = _protocol(tokens, asked["evaluation"]["windows"], recipe.sequence)
    trainee, masks = _initial(stage, store, recipe)
    result = train(
        trainee,
        Slice(tokens, start, stop, recipe),
        masks=masks,
        measure=lambda model: held_out_loss(model, protocol, recipe.micro_batch),
        points=asked["evaluation"]["points"],
        house=Housekeeping(folder=work / "checkpoints", label=stage.name),
    )
    Masks(trainee.model, masks).check()
    out = work / "model"
    out.mkdir(exist_ok=True)
    line = f"Trained by secateur on {result['tokens']:,} tokens from {asked['init']} weights ({stage.name})."
    config = trainee.model.config
    write_checkpoint(
        out,
        config.to_diff_dict() | {"model_type": config.model_type, "dtype": "float32"},
        model_tensors(trainee.model),
        provenance={"kind": "trained", "init": asked["init"], "tokens": result["tokens"], "stage": stage.fingerprint},
        card=model_card(stage.name, None, [line]),
    )
    load_tokenizer(corpus / "tokenizer").save_pretrained(out)
    shape = Checkpoint(out).shape
    return {**result, "parameters": {"total": shape.total, "non_embedding": shape.non_embedding}}


def _initial(stage: Stage, store: Store, recipe: Recipe) -> tuple[Trainee, dict[str, Tensor]]:
    """The model before its first step, and the masks that it must keep."""
    asked = stage.identity
    source = store.folder(stage.inputs["model"]) / "model" if "model" in stage.inputs else None
    if source and asked["init"] == "pruned":
        checkpoint = Checkpoint(source)
        model = skeleton(checkpoint.config, source)
        return place(model, stored_weights(checkpoint), Execution()), load_masks(source)
    shape = Shape(**{**asked["shape"], "switches": tuple(asked["shape"]["switches"])})
    corpus = store.folder(stage.inputs["corpus"])
    config = llama_config(shape, context=recipe.sequence, tokenizer=load_tokenizer(corpus / "tokenizer"))
    model = skeleton(config, corpus)
    weights = fresh_weights(model, std=recipe.init_std, seed=recipe.seed)
    return place(model, weights, Execution()), load_masks(source) if source else {}


def _evaluate(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    tokens = TokenStore(store.folder(stage.inputs["corpus"]))
    protocol = _protocol(tokens, stage.identity["windows"], stage.identity["seqlen"])
    checkpoint = Checkpoint(store.folder(stage.inputs["model"]) / "model")
    return {**evaluate(checkpoint.load(), protocol), "sparsity": sparsity(checkpoint), "protocol": protocol.record()}


def _protocol(tokens: TokenStore, windows: int, seqlen: int) -> Protocol:
    ids = tokens.read("heldout", 0, min(windows * seqlen, tokens.tokens("heldout")))
    return Protocol.of_stream(ids, seqlen, "held-out documents")


def sparsity(checkpoint: Checkpoint) -> float:
    """The share of exact zeros among the weights of the block linears."""
    zeros = weights = 0
    layers = checkpoint.shape.layers
    with task("count zeros", layers) as progress:
        for layer in range(layers):
            for linear in checkpoint.family.linears:
                tensor = checkpoint.tensor(checkpoint.family.block_tensor(layer, linear))
                zeros += int((tensor == 0).sum())
                weights += tensor.numel()
            progress.advance()
    return zeros / weights


_KINDS: dict[str, Callable[[Stage, Store, Path], dict[str, Any]]] = {
    "corpus": _corpus,
    "prune": _prune,
    "train": _train,
    "evaluate": _evaluate,
}
