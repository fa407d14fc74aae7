from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers import SIZES, model_tensors, naive_loss, randomise, tiny_family, windows
from secateur.config import fingerprint, from_identity, identity, parse
from secateur.errors import RunError, UserError
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.checkpoint_writing import write_checkpoint
from secateur.model.shapes import Shape
from secateur.training.batches import Slice
from secateur.training.checkpoints import Saver
from secateur.training.init import fresh_config, fresh_weights
from secateur.training.loop import RunOptions, train_loop
from secateur.training.masks import Masks
from secateur.training.metrics import Metrics
from secateur.training.parallel import Execution, TrainModule, place_model
from secateur.training.recipe import InitSpec, Recipe, learning_rate, make_optimizer

DOCUMENT = 13  # tokens in one
TOKENS = 5 * 32 + 2 * 8 + 5  # five whole steps, then two windows and five tokens
RECIPE = Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-3, warmup=0.4, micro_batch=3)


class Store:
    """Holds ``arange``, remembers what is read, and fails when asked for a window too many."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.reads: list[tuple[str, int, int]] = []
        self.fail_at = fail_at

    def targets(self, split: str, start: int, stop: int) -> None:
        return None

    def positions(self, split: str, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % DOCUMENT  # every document has as many tokens

    def documents_in(self, split: str, start: int, stop: int) -> range:
        return range(start // DOCUMENT, (stop - 1) // DOCUMENT + 1)

    def document_name(self, split: str, index: int) -> str:
        return f"document {index}"

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        if self.fail_at is not None and len(self.reads) >= self.fail_at:
            raise KeyboardInterrupt
        self.reads.append((split, start, stop))
        return np.random.default_rng(3).integers(0, 61, 10_000)[start:stop]


class Counting(Store):
    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        super().read(split, start, stop)
        return np.arange(start, stop)


def tiny(seed: int = 0, **config: Any) -> PreTrainedModel:
    sizes = {**SIZES, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None, **config}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    randomise(model, seed)
    return model


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(4)
    names = [n for n, _ in model.named_parameters() if "_proj.weight" in n]
    return {n: torch.rand(model.get_parameter(n).shape, generator=draw) > 0.5 for n in names}


def held_out(module: TrainModule) -> float:
    module.eval()
    loss = naive_loss(module.model, windows(2, 8))
    module.train()
    return loss


def run(
    model: PreTrainedModel,
    folder: Path,
    *,
    store: Store | None = None,
    recipe: Recipe = RECIPE,
    tokens: int = TOKENS,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    options: dict[str, Any] = {"masks": {}, "measure": held_out, "points": 3, **changes}
    data = Slice(store or Store(), 100, 100 + tokens, recipe)
    return train_loop(TrainModule(model), data, options=RunOptions(folder, "test", **(settings or {})), **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- the recipe


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 1000])
def test_learning_rate(steps: int) -> None:
    recipe = Recipe(peak_rate=2e-3)
    warm = math.ceil(0.05 * steps)
    rates = [learning_rate(recipe, step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(2e-3 / warm)
    assert rates[warm - 1] == pytest.approx(2e-3) and max(rates) == pytest.approx(2e-3)
    rises = [b - a for a, b in pairwise(rates[:warm])]
    assert rises == pytest.approx([2e-3 / warm] * (warm - 1))
    if steps > 2:
        assert rates[-1] == pytest.approx(2e-4)
        assert all(a > b for a, b in pairwise(rates[warm:]))
        assert rates[warm] + rates[-1] == pytest.approx(rates[warm + 3] + rates[-4])  # symmetric about its middle
    if steps == 1000:
        assert rates[warm + 237] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 237 / 949)) / 2))


def test_a_warm_up_from_zero() -> None:
    recipe = Recipe(peak_rate=1.0, warmup=0.2, warmup_from="zero")
    rates = [learning_rate(recipe, step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == [learning_rate(Recipe(peak_rate=1.0, warmup=0.2), step, 20) for step in range(4, 20)]


def test_no_warm_up() -> None:
    recipe = Recipe(peak_rate=1.0, warmup=0.0, final_share=0.0)
    assert [learning_rate(recipe, s, 3) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(recipe, 0, 1) == 1.0


def test_the_recipe() -> None:
    assert [RECIPE.steps(n) for n in (1, 32, 33, 64, TOKENS)] == [1, 1, 2, 2, 6]
    assert parse(Recipe, {"tokens_per_step": "512k", "sequence": 1000, "peak_rate": 4e-3}, origin="x").peak_rate == 4e-3
    with pytest.raises(UserError, match=r"tokens_per_step: 100 is no multiple of recipe\.sequence 64; set it to 128$"):
        Recipe(sequence=64, tokens_per_step=100)
    with pytest.raises(UserError, match=r"8192, the default; set it to 8192, or sequence to 512$"):
        Recipe(tokens_per_step=512)
    with pytest.raises(UserError, match="no multiple"):
        parse(Recipe, {"sequence": 64, "tokens_per_step": 100}, origin="x")
    assert fingerprint(Recipe(micro_batch=2)) == fingerprint(Recipe())
    assert fingerprint(Recipe(seed=2)) != fingerprint(Recipe())


def test_recipes_keep_the_identity_of_earlier_records() -> None:
    keys = ["init_std", "decay"]
    assert {key: identity(Recipe())[key] for key in keys} == {"init_std": 0.02, "decay": 0.2}
    assert not {"init", "decay_share", "mask", "warmup_from", "decay_of"} & identity(Recipe()).keys()
    changed = {"decay": "all", "mask": "after-clip", "warmup_from": "zero", "init": {"kind": "fan-in", "std": 0.1}}
    recipe = parse(Recipe, {**changed, "decay_share": 0.3}, origin="x")
    assert recipe.init == InitSpec(kind="fan-in", std=0.1)
    assert from_identity(Recipe, identity(recipe), origin="x") == recipe
    for key, value in changed.items():
        assert fingerprint(parse(Recipe, {key: value}, origin="x")) != fingerprint(Recipe()), key
    older = parse(Recipe, {"init_std": 0.06, "decay": 0.25}, origin="x")
    assert older == parse(Recipe, {"init": {"std": 0.06}, "decay_share": 0.25}, origin="x")
    assert parse(Recipe, {"init": "fan-in"}, origin="x").init == InitSpec(kind="fan-in")
    with pytest.raises(UserError, match="x: decay: 'al' is not known; did you mean 'all'"):
        parse(Recipe, {"decay": "al"}, origin="x")
    with pytest.raises(UserError, match=r"x: init\.kind: 'fanin' is not known; did you mean 'fan-in'"):
        parse(Recipe, {"init": {"kind": "fanin"}}, origin="x")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay(tied: bool, decay: str) -> None:
    model = tiny(attention_bias=True, tie_word_embeddings=tied)
    before, optimizer = weights(model), make_optimizer(model.parameters(), Recipe(weight_decay=0.25, decay=decay))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what is left is the decay
    optimizer.step()
    for name, parameter in model.named_parameters():
        matrix = name.endswith("_proj.weight") or "embed" in name or "lm_head" in name
        factor = 1 - 0.5 * 0.25 if matrix or decay == "all" else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


# --- what is read


def read_order(seed: int = 0) -> list[int]:
    """The documented order of the 22 whole windows, with the rest of the slice behind them."""
    return [*torch.randperm(22, generator=torch.Generator().manual_seed(seed)).tolist(), 22]


@pytest.mark.parametrize("seed", [0, 7])
def test_every_token_is_read_once_in_an_order_of_its_seed(seed: int, tmp_path: Path) -> None:
    store = Counting()
    model, seen = tiny(vocab_size=400), []
    model.model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    recipe = Recipe(sequence=8, tokens_per_step=32, data_seed=seed)
    result = run(model, tmp_path, store=store, recipe=recipe, measure=lambda _: 1.0)
    starts = [100 + 8 * window for window in read_order(seed)]
    assert store.reads == [("train", at, min(at + 8, 100 + TOKENS)) for at in starts]
    assert TOKENS == result["tokens"] == TOKENS and result["steps"] == 6
    assert result["targets"] == 22 * 7 + 4
    ids = torch.cat([ids.reshape(-1) for ids in seen]).tolist()
    assert ids != sorted(ids) and sorted(ids) == list(range(100, 100 + TOKENS))
    assert [tuple(ids.shape) for ids in seen] == [(4, 8)] * 5 + [(2, 8), (1, 5)]
    assert [p["tokens"] for p in result["curve"]] == [0, 64, 128, TOKENS]


def test_a_lone_last_token_counts_as_consumed(tmp_path: Path) -> None:
    result = run(tiny(), tmp_path, tokens=32 + 8 + 1)
    assert result["tokens"] == 41 and result["targets"] == 5 * 7 and result["steps"] == 2


@pytest.mark.parametrize("points", [1, 2, 6, 50])
def test_the_curve_ends_at_the_end(points: int, tmp_path: Path) -> None:
    result = run(tiny(), tmp_path, points=points)
    curve = result["curve"]
    assert curve[0]["tokens"] == 0 and curve[0]["training_loss"] is None and curve[-1]["tokens"] == TOKENS
    assert len(curve) == min(points, 6) + 1
    assert curve[-1]["learning_rate"] == pytest.approx(1e-4)
    assert all(math.isfinite(p["loss"]) for p in curve)


# --- the loop against one written by hand


def by_hand(model: PreTrainedModel, masks: dict[str, Tensor], recipe: Recipe) -> tuple[list[float], list[float]]:
    """The same run, written without any of secateur: losses and gradient norms of all steps."""
    model.train()
    ids = np.random.default_rng(3).integers(0, 61, 10_000)[100 : 100 + TOKENS].tolist()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name] *= mask
    decayed = [p for n, p in parameters.items() if not n.endswith(("norm.weight", "bias"))]
    plain = [p for n, p in parameters.items() if n.endswith(("norm.weight", "bias"))]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.1 * (recipe.decay == "all")},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=recipe.epsilon)
    losses, norms = [], []
    for step in range(6):
        every = []
        for number in read_order()[step * 4 : step * 4 + 4]:
            window = torch.tensor([ids[number * 8 : number * 8 + 8]])
            out = model(input_ids=window, use_cache=False).logits
            every += [cross_entropy(out[0, t], window[0, t + 1]) for t in range(window.shape[1] - 1)]
        loss = torch.stack(every).mean()
        optimizer.zero_grad()
        loss.backward()
        if recipe.mask == "before-clip":
            for name, mask in masks.items():
                parameters[name].grad *= mask  # type: ignore[operator]
        norm = sum(float((p.grad.double() ** 2).sum()) for p in parameters.values()) ** 0.5  # type: ignore[union-attr]
        for parameter in parameters.values():
            parameter.grad *= min(1.0, recipe.clip / norm)  # type: ignore[operator]
        for name, mask in masks.items():
            parameters[name].grad *= mask  # type: ignore[operator]
        warm = 3  # ceil(0.4 * 6)
        after = (step - warm) / 2
        cosine = 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * after)) / 2)
        for group in optimizer.param_groups:
            first = 1 if recipe.warmup_from == "step" else 0
            group["lr"] = 1e-3 * (step + first) / 3 if step < warm else cosine
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name] *= mask
        losses.append(float(loss.detach()))
        norms.append(norm)
    return losses, norms


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("clip", [1.0, 100.0])
def test_the_loop_against_one_by_hand(masked: bool, variant: dict[str, bool], clip: float, tmp_path: Path) -> None:
    # With the usual epsilon the rounding of a gradient that is nearly zero would show in full.
    sizes: dict[str, Any] = {"sequence": 8, "tokens_per_step": 32, "micro_batch": 3}
    recipe = Recipe(**sizes, peak_rate=1e-3, warmup=0.4, clip=clip, epsilon=1e-6)
    model, reference = tiny(**variant), tiny(**variant)
    masks, start = masks_of(model) if masked else {}, weights(model)
    norms = compare_with_hand(model, reference, masks, recipe, tmp_path)
    assert (min(norms) > 1) if clip == 1 else (max(norms) < 100)
    moved = max(float((start[n] - p).abs().max()) for n, p in weights(model).items() if n not in masks)
    assert moved > 1e-3


@pytest.mark.parametrize("mask", ["before-clip", "after-clip"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_mask_and_decay_against_a_loop_by_hand(mask: str, decay: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"mask": mask, "decay": decay, "warmup_from": "zero", "micro_batch": 3}
    recipe = Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-3, warmup=0.4, epsilon=1e-6, **how)
    model, reference, other = tiny(), tiny(), tiny()
    masks = masks_of(model)
    norms = compare_with_hand(model, reference, masks, recipe, tmp_path)
    assert min(norms) > 1  # so that clipping has an effect
    by_hand(other, masks, dataclasses.replace(recipe, decay="all" if decay == "matrices" else "matrices"))
    norm = "model.norm.weight"
    assert (model.get_parameter(norm) - other.get_parameter(norm)).abs().max() > 1e-5


def compare_with_hand(
    model: PreTrainedModel, reference: PreTrainedModel, masks: dict[str, Tensor], recipe: Recipe, folder: Path
) -> list[float]:
    """Train both, and assert that they agree; returns the norms of the gradients."""
    result = run(model, folder, masks=masks, points=6, recipe=recipe)
    losses, norms = by_hand(reference, masks, recipe)
    assert [p["training_loss"] for p in result["curve"][1:]] == pytest.approx(losses, rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name), parameter, rtol=0, atol=1e-5, msg=name
        )  # weights move by 1e-3
    assert result["curve"][-1]["loss"] == pytest.approx(held_out(TrainModule(reference)), rel=1e-5)
    return norms


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 64])
def test_micro_batches_are_execution_only(micro_batch: int, tmp_path: Path) -> None:
    recipes = [Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-3, micro_batch=m) for m in (3, micro_batch)]
    curves = [run(tiny(), tmp_path / f"{i}", recipe=recipe, points=6)["curve"] for i, recipe in enumerate(recipes)]
    for a, b in zip(*curves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert (a["training_loss"] or 0) == pytest.approx(b["training_loss"] or 0, rel=1e-5)


# --- masks


def test_masks_hold_exactly(tmp_path: Path) -> None:
    model = tiny()
    masks, points = masks_of(model), []

    def measure(held: TrainModule) -> float:
        points.append(sum(int((held.model.get_parameter(n) != 0)[~m].sum()) for n, m in masks.items()))
        return 1.0

    run(model, tmp_path / "a", masks=masks, measure=measure, points=6)
    assert points == [0] * 7
    for name, mask in masks.items():
        assert int((model.get_parameter(name) != 0)[mask].sum()) == int(mask.sum())
    sparse = tiny()
    Masks(sparse, masks).apply()
    run(sparse, tmp_path / "b")
    revived = sum(int((sparse.get_parameter(n) != 0)[~m].sum()) for n, m in masks.items())
    assert revived > 0.9 * sum(int((~m).sum()) for m in masks.values())


def test_masks_are_not_derived_from_zeros(tmp_path: Path) -> None:
    model = tiny()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0] = 0
    mask = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
    mask[1] = False
    run(model, tmp_path, masks={name: mask})
    assert model.get_parameter(name)[0].abs().min() > 0 and not model.get_parameter(name)[1].any()


def test_revived_weights_are_found() -> None:
    model = tiny()
    masks = masks_of(model)
    held = Masks(model, masks)
    with pytest.raises(RuntimeError, match=r"no longer zero: [0-9,]+ pruned weights?"):
        held.check()
    held.apply()
    held.check()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[(~masks[name]).view(-1).nonzero()[5]] = 1e-30
    with pytest.raises(RuntimeError, match=rf"{name}: no longer zero: 1 pruned weight"):
        held.check()
    with pytest.raises(KeyError):
        Masks(model, {"model.layers.9.x": next(iter(masks.values()))})


# --- stopping and going on


def stopping_measure(after: int) -> Callable[[TrainModule], float]:
    calls = []

    def measure(model: TrainModule) -> float:
        calls.append(0)
        if len(calls) > after:
            raise KeyboardInterrupt
        return held_out(model)

    return measure


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "stop",
    [{"measure": stopping_measure(2)}, {"store": Store(fail_at=18)}],
    ids=["measure", "store"],
)
def test_a_run_goes_on_at_the_same_bits(stop: dict[str, Any], masked: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"masks": masks_of(tiny()) if masked else {}, "points": 4, "settings": {"save_every": 2}}
    whole = tiny(tie_word_embeddings=masked)
    wanted = run(whole, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tie_word_embeddings=masked), tmp_path / "cut", **(options | stop_again(stop)))
    assert len(list((tmp_path / "cut").glob("step-*"))) >= 1
    store = Store()
    again = tiny(seed=9, tie_word_embeddings=masked)  # nothing of it may matter
    got = run(again, tmp_path / "cut", **options, store=store)
    assert 0 < len(store.reads) < 23  # it did not begin anew
    assert got == wanted and same(weights(again), weights(whole))
    assert [p.name for p in sorted((tmp_path / "cut").iterdir())] == ["step-00000004", "step-00000006"]
    once_more, store = tiny(seed=8, tie_word_embeddings=masked), Store()
    assert run(once_more, tmp_path / "cut", **options, store=store) == wanted
    assert same(weights(once_more), weights(whole)) and store.reads == []


def stop_again(stop: dict[str, Any]) -> dict[str, Any]:
    if "measure" in stop:
        return {"measure": stopping_measure(3)}
    return {"store": Store(fail_at=18)}


def restored(folder: Path, model: PreTrainedModel) -> dict[str, Any] | None:
    return Saver(folder, dict(model.named_parameters()), make_optimizer(model.parameters(), RECIPE)).load()


def shard(step: Path) -> Path:
    (found,) = step.glob("*.safetensors")
    return found


class InOrder(Slice):
    """Windows as they lie, so that runs over parts of a slice read what one run over the whole does."""

    @property
    def order(self) -> Tensor:  # type: ignore[override]
        return torch.arange(self.tokens // self.recipe.sequence)


@pytest.mark.parametrize("masked", [False, True])
def test_a_trunk_and_its_decay_are_one_run_with_both(masked: bool, tmp_path: Path) -> None:
    recipe = Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-3, warmup=0.125, schedule="wsd", decay_share=0.25)
    masks = masks_of(tiny()) if masked else {}

    def part(model: PreTrainedModel, span: tuple[int, int], folder: str, **how: Any) -> Path | None:
        settings = RunOptions(tmp_path / folder, "test", origin=how.pop("origin", None))
        data = InOrder(Store(), *span, dataclasses.replace(recipe, **how))
        train_loop(TrainModule(model), data, masks=masks, measure=held_out, points=1, options=settings)
        return max((tmp_path / folder).glob("step-*"))

    whole, parts = tiny(), tiny()
    part(whole, (0, 256), "whole")
    first = part(parts, (0, 96), "first", schedule="constant", warmup=1 / 3)
    second = part(parts, (96, 192), "second", schedule="constant", warmup=0.0, origin=first)
    third = tiny(seed=9)  # its weights come from the trunk
    part(third, (192, 256), "decay", schedule="linear", warmup=0.0, origin=second)
    assert same(weights(third), weights(whole))
    again = tiny(seed=9)
    shutil.rmtree(max((tmp_path / "decay").glob("step-*")))
    part(again, (192, 256), "decay", schedule="linear", warmup=0.0, origin=second)
    assert same(weights(again), weights(whole))
    flip(shard(second))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this checkpoint is damaged"):
        part(tiny(), (192, 256), "late", schedule="linear", origin=second)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip(shard(step)),
        lambda step: shard(step).write_bytes(b""),
        lambda step: shard(step).unlink(),
        lambda step: shutil.copyfile(shard(step.with_name("step-00000004")), shard(step)),
        lambda step: (step / "state.json").unlink(),
        lambda step: (step / "state.json").write_text("{"),
        lambda step: (step / "state.json").write_text("{}"),
        lambda step: (step / "state.json").write_text("[]"),
    ],
    ids=["flipped", "empty", "no shard", "shard of another save", "no state", "half a state", "blank state", "list"],
)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], object], tmp_path: Path) -> None:
    whole = tiny()
    wanted = run(whole, tmp_path, settings={"save_every": 2})
    newest, older = sorted(tmp_path.glob("step-*"), reverse=True)
    damage(newest)
    state = restored(tmp_path, tiny(seed=9))
    assert state is not None and state["step"] == 4
    store, again = Store(), tiny(seed=9)
    assert run(again, tmp_path, settings={"save_every": 2}, store=store) == wanted
    assert [r[1] for r in store.reads] == [100 + 8 * window for window in read_order()[16:]]
    assert same(weights(again), weights(whole))
    assert json.loads((newest / "state.json").read_text())["step"] == 6  # repaired on the way
    damage(newest)
    shutil.rmtree(older)
    assert restored(tmp_path, tiny(seed=9)) is None


def test_a_kill_while_writing_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    run(model, tmp_path, settings={"save_every": 2})
    before = sorted(p.name for p in tmp_path.iterdir())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.training.checkpoints.sync_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            optimizer = make_optimizer(model.parameters(), RECIPE)
            Saver(tmp_path, dict(model.named_parameters()), optimizer).save({"step": 7})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == before
    state = restored(tmp_path, model)
    assert state is not None and state["step"] == 6


def test_nan_stops_the_run_and_names_the_documents(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(
        RunError, match=r"test: loss nan, .* at step 1 in document \d+; .*no checkpoint yet; the weights"
    ):
        run(model, tmp_path, measure=lambda _: 1.0)
    assert not list(tmp_path.glob("step-*"))


def test_a_rate_that_is_too_high_is_named_first(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, peak_rate=1e30)
    with pytest.raises(RunError, match=r"^test: lower peak_rate, in a new directory: loss \S+, .* at step [2-9]"):
        run(tiny(), tmp_path, recipe=recipe, measure=lambda _: 1.0)


def test_a_bad_window_is_found_among_good_ones(tmp_path: Path) -> None:
    """The window holds a token that no other does; what it becomes in the second block is not finite."""
    model, metrics = tiny(vocab_size=62), Metrics(tmp_path / "metrics.jsonl")
    bad = read_order()[4 * 3 + 1]  # the second window of the fourth step

    class Poisoned(Store):
        def read(self, split: str, start: int, stop: int) -> np.ndarray:
            ids = super().read(split, start, stop)
            return np.full_like(ids, 61) if start == 100 + 8 * bad else ids

    def poison(_m: object, arguments: tuple[Tensor], out: Tensor) -> Tensor:
        return out.masked_fill((arguments[0] == 61)[..., None], float("inf"))

    model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(
        RunError,
        match=r"test: lower peak_rate, .* at step 4; the last good checkpoint is .*step-00000002; .*document \d+",
    ):
        run(model, tmp_path, store=Poisoned(), settings={"save_every": 2, "metrics": metrics})
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (100 + 8 * bad) // DOCUMENT, (107 + 8 * bad) // DOCUMENT
    assert told[-1]["documents"] == [f"document {i}" for i in range(first, last + 1)]
    assert [t["step"] for t in told if "loss" in t] == [1, 2, 3]


# --- fresh models


def fresh(config: Any, *, seed: int, **init: Any) -> PreTrainedModel:
    model = skeleton(config, Path("x"))
    return place_model(model, fresh_weights(model, InitSpec(**init), seed=seed), Execution()).model


def test_new_models() -> None:
    shape = Shape(hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=500)
    tokenizer: Any = SimpleNamespace(bos_token_id=0, eos_token_id=1)
    config = fresh_config(shape, context=32, tokenizer=tokenizer)
    assert Shape.of_config(config, where="x") == shape
    with_biases = shape.switched_on(["attention_bias", "mlp_bias"])  # what FLAP leaves behind, and its twin has
    assert Shape.of_config(fresh_config(with_biases, context=32, tokenizer=tokenizer), where="x") == with_biases
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (0, 1, 32)
    torch.manual_seed(1)
    model = fresh(config, std=0.02, seed=3)
    torch.manual_seed(2)
    assert same(weights(model), weights(fresh(config, std=0.02, seed=3)))
    assert not same(weights(model), weights(fresh(config, std=0.02, seed=4)))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == 1).all(), name
            continue
        # A normal truncated at two deviations has 0.8796 of the deviation.
        assert float(parameter.detach().std()) == pytest.approx(0.02 * 0.8796, rel=0.08), name
        assert float(parameter.detach().abs().max()) <= 0.04 and abs(float(parameter.detach().mean())) < 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_fan_in(tied: bool) -> None:
    sizes: dict[str, Any] = {**SIZES, "vocab_size": 997, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    model = fresh(LlamaConfig(**sizes, tie_word_embeddings=tied), seed=3, kind="fan-in", std=0.3)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == 1).all(), name
            continue
        std = 0.3 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        std /= 4 if "q_proj" in name else 1
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name
        assert float(parameter.detach().abs().max()) > 2.5 * std, name  # not truncated


def test_fan_in_of_a_fused_projection(tmp_path: Path) -> None:
    model = skeleton(Checkpoint(tiny_family(tmp_path, "phi3")).config, tmp_path)
    shape, name = Shape.of_config(model.config, where="x"), "model.layers.0.self_attn.qkv_proj.weight"
    draw = fresh_weights(model, InitSpec(kind="fan-in"), seed=1)(name)
    queries, keys = draw.split([shape.heads * shape.head_dim, len(draw) - shape.heads * shape.head_dim])
    assert float(queries.std()) == pytest.approx((shape.hidden * shape.head_dim) ** -0.5, rel=0.1)
    assert float(keys.std()) == pytest.approx(shape.hidden**-0.5, rel=0.1)


def test_biases_of_new_models_are_zero_and_tied_heads_stay_tied() -> None:
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, dtype="bfloat16")
    model = fresh(config, std=0.02, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_trained_model_is_written_and_read(tmp_path: Path) -> None:
    model = tiny()
    run(model, tmp_path / "steps")
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", model.config.to_dict(), model_tensors(model), provenance={}, card="x")
    assert same(weights(Checkpoint(tmp_path / "out").load()), weights(model))
