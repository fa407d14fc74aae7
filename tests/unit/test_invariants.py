"""What holds for all methods, whatever the model: counts, nesting, nothing lost that is nothing, same bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formulas import Subject, pruned
from helpers import SCORED, calibration, hf, learned, logits, windows
from proofs import DeadUnits
from secateur.calibration.statistics import Gram
from secateur.methods.registry import METHODS, get_method
from secateur.methods.selection import Selector, keep_channels, keep_globally, lowest_indices
from secateur.methods.sparsegpt import SparseGPT
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.calibration import Calibration
from secateur.pruning.pattern import Pattern
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

WIDTH = ("llm-pruner", "minitron-width", "wanda-sp", "flap", "random-width")
RANDOM = ("random-depth", "random-width", "random-weight", "random-expert")
DENSE = [name for name, info in METHODS.items() if info.granularity != "experts"]  #: methods for any model
LAYERED = {"ffn": 48, "kv_heads": 2}
SIZES = {"hidden": 40, **LAYERED}


def plan_of(subject: Subject, method: str, target: Target | None = None, ids: Tensor | None = None, **run: Any) -> Plan:
    target = target or {
        "depth": Target(sizes={"layers": subject.layers - 1}),
        "width": Target(sizes=SIZES if method not in ("wanda-sp", "flap") else LAYERED),
        "sparse": Target(ratio=0.4),
    }[get_method(method).granularity]  # fmt: skip
    return make_plan(subject.checkpoint, method, target, calibration(subject.ids if ids is None else ids), **run)


def made(subject: Subject, method: str, folder: Path, *, batch: int = 2) -> tuple[Plan, Checkpoint]:
    """A plan, and what is cut to it: the model, or what learning made of it."""
    if method in SCORED:
        return plan_of(subject, method, batch=batch), subject.checkpoint
    target = Target(sizes={"layers": subject.layers - 1, **SIZES})
    return learned(subject.checkpoint, method, target, subject.ids, folder, batch=batch, windows=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), "llama-biased", layers=3)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), "gemma3", layers=3)


def selection(plan: Plan) -> dict[str, Tensor]:
    found = {"layers": plan.keep_layers, "hidden": plan.keep_hidden, **plan.masks}
    for layer in plan.keep_layers.tolist():
        found |= {f"ffn.{layer}": plan.keep_ffn[layer], f"kv.{layer}": plan.keep_kv[layer]}
    return found


# Selection.

ratios = st.integers(1, 99).map(lambda hundredths: hundredths / 100)
quickly = settings(deadline=None, max_examples=25)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 120))
    values = draw(st.integers(1, 8))  # few different values make many ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randint(-values, values, (rows, columns), generator=generator).float()


@settings(deadline=None, max_examples=100)
@given(matrices(), ratios, ratios)
def test_selectors_take_the_lowest_and_of_equals_the_first(scores: Tensor, ratio: float, other: float) -> None:
    keep = Selector(ratio)(scores)
    columns = scores.shape[1]
    prune = math.floor(Fraction(str(ratio)) * columns)
    for row, kept in zip(scores.tolist(), keep.tolist(), strict=True):
        pruned = sorted(range(columns), key=lambda j: (row[j], j))[:prune]
        assert [j for j in range(columns) if not kept[j]] == sorted(pruned)
    fewer, more = Selector(max(ratio, other))(scores), Selector(min(ratio, other))(scores)
    assert not (fewer & ~more).any()
    whole = Selector(ratio, "linear")(scores)
    flat = Selector(ratio)(scores.reshape(1, -1))
    assert torch.equal(whole.reshape(1, -1), flat)
    fewer, more = Selector(max(ratio, other), "linear")(scores), Selector(min(ratio, other), "linear")(scores)
    assert not (fewer & ~more).any()


@quickly
@given(st.integers(1, 12), st.data())
def test_patterns_keep_n_of_each_m(of: int, data: st.DataObject) -> None:
    kept, rows, spans = data.draw(st.integers(1, of)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    scores = torch.randint(
        0, 5, (rows, spans * of), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    for within in ("row", "linear"):
        keep = Selector(Target(pattern=Pattern(kept, of)).sparsity, within, of)(scores.float())
        assert (keep.reshape(-1, of).sum(dim=1) == kept).all()
        for values, stays in zip(scores.reshape(-1, of).tolist(), keep.reshape(-1, of).tolist(), strict=True):
            best = sorted(range(of), key=lambda j: (-values[j], -j))[:kept]
            assert [j for j in range(of) if stays[j]] == sorted(best)


@pytest.mark.parametrize(
    ("ratio", "columns", "pruned"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7), (0.5, 7, 3), (1 - 3 / 7, 7, 4)],
)
def test_the_count_is_the_floor_of_the_decimal_ratio(ratio: float, columns: int, pruned: int) -> None:
    """In binary, 0.29 * 100 is 28.999999999999996."""
    assert ((~Selector(ratio)(torch.zeros(2, columns))).sum(dim=1) == pruned).all()


def test_the_count_is_exact_for_the_largest_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count alone: such a tensor need not be made."""
    counted: list[int] = []

    def stop(_groups: Tensor, count: int) -> None:
        counted.append(count)
        raise StopIteration

    monkeypatch.setattr("secateur.methods.selection._lowest", stop)
    with pytest.raises(StopIteration):
        Selector(0.29, "linear")(torch.zeros(1).expand(10**4, 10**4))
    assert counted == [29 * 10**6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selectors_whatever_the_type_and_layout(dtype: torch.dtype) -> None:
    """bfloat16 takes the way that other devices take; a transposed matrix is what SparseGPT shows."""
    scores = torch.randint(0, 40, (64, 48), generator=torch.Generator().manual_seed(0))
    for within, span in (("row", None), ("linear", None), ("row", 4), ("row", 16)):
        select = Selector(0.5, within, span)
        wanted = select(scores.long())
        assert torch.equal(select(scores.to(dtype)), wanted)
        assert torch.equal(select(scores.to(dtype).T.contiguous().T), wanted)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_channels_of_the_highest_scores_stay(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    kept = keep_channels(scores, count)
    assert kept.tolist() == sorted(sorted(range(len(values)), key=lambda c: (-values[c], c))[:count])
    assert kept.dtype == torch.int64
    assert set(keep_channels(scores, data.draw(st.integers(1, count))).tolist()) <= set(kept.tolist())
    assert lowest_indices(scores, count) == sorted(sorted(range(len(values)), key=lambda c: (values[c], c))[:count])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_groups_compete_until_enough_is_gone(values: list[list[int]], data: st.DataObject) -> None:
    scores = {f"g.{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    costs = {name: data.draw(st.integers(1, 9)) for name in scores}
    total = sum(costs[n] * len(s) for n, s in scores.items())
    remove = data.draw(st.integers(0, total))
    kept = keep_globally(scores, costs, remove)
    units = [(v, -i, -j, costs[f"g.{i}"]) for i, group in enumerate(values) for j, v in enumerate(group)]
    best = {(-i, -group.index(max(group))) for i, group in enumerate(values)}
    order = sorted(unit for unit in units if unit[1:3] not in best)  # the lowest first; of equals the last
    gone: set[tuple[int, int]] = set()
    size = 0
    for _, i, j, cost in order:
        if abs(size + cost - remove) >= abs(size - remove) and size + cost > remove:
            break
        size += cost
        gone.add((-i, -j))
    for i, group in enumerate(values):
        assert kept[f"g.{i}"].tolist() == [j for j in range(len(group)) if (i, j) not in gone]


# All methods.


@pytest.mark.parametrize("method", DENSE)
def test_the_batch_changes_nothing_beyond_rounding(method: str, llama: Subject, gemma: Subject, tmp_path: Path) -> None:
    near = 1e-5 if method in SCORED else 1e-2  # over many steps rounding adds up
    for subject in (llama, gemma):
        plans = []
        for batch in (1, 3):
            folder = tmp_path / f"{subject.name}-{batch}"
            folder.mkdir()
            plans.append(made(subject, method, folder, batch=batch)[0])
        one, two = plans
        assert one.scores.keys() == two.scores.keys()
        for name, scores in one.scores.items():
            torch.testing.assert_close(scores, two.scores[name], rtol=near, atol=near)
        chosen = selection(two)
        for name, kept in selection(one).items():
            if name in one.masks:
                assert float((kept != chosen[name]).float().mean()) < (0.05 if method == "alps" else 0.01)
            else:
                assert torch.equal(kept, chosen[name])


@pytest.mark.parametrize("method", DENSE)
def test_the_same_again_is_the_same_to_the_byte(method: str, llama: Subject, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        plan, source = made(llama, method, tmp_path / name)
        write_pruned(source, plan, out)
        written.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
    assert written[0] == written[1] and "plan.safetensors" in written[0]


@pytest.mark.parametrize("method", RANDOM[:3])
def test_random_choices_follow_from_the_seed_alone(method: str, llama: Subject) -> None:
    plans = [
        plan_of(llama, method),
        plan_of(llama, method, options={"seed": get_method(method).seed}, ids=windows(1, 3)),
        plan_of(llama, method, options={"seed": "1"}),
    ]
    first, again, other = (selection(plan) for plan in plans)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(plan.calibration["source"] is None for plan in plans)
    assert all(
        (~mask).sum(dim=1).tolist() == [math.floor(0.4 * mask.shape[1])] * len(mask) for mask in plans[0].masks.values()
    )


@pytest.mark.parametrize("method", [name for name in METHODS if get_method(name).granularity == "width"])
def test_less_room_keeps_a_part_of_what_more_room_kept(method: str, gemma: Subject) -> None:
    """Scores do not depend on how much is kept, but for Wanda-sp's behind the first block."""
    wide, narrow = plan_of(gemma, method), plan_of(gemma, method, Target(sizes={"ffn": 20, "kv_heads": 1}))
    for space in ("ffn", "kv"):
        kept = getattr(wide, f"keep_{space}"), getattr(narrow, f"keep_{space}")
        for layer in range(1 if method == "wanda-sp" else gemma.layers) if method != "random-width" else ():
            assert set(kept[1][layer].tolist()) < set(kept[0][layer].tolist())
    if "hidden" in get_method(method).scores and method != "random-width":
        narrower = plan_of(gemma, method, Target(sizes={"hidden": 24}))
        assert set(narrower.keep_hidden.tolist()) < set(wide.keep_hidden.tolist())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "random-weight"])
def test_more_sparsity_prunes_more_of_the_same(method: str, llama: Subject) -> None:
    plans = [plan_of(llama, method, Target(ratio=ratio)) for ratio in (0.2, 0.5, 0.9)]
    for name in plans[0].masks:
        if method != "wanda" or ".layers.0." in name:
            most, some, few = (plan.masks[name] for plan in plans)
            assert not (some & ~most).any() and not (few & ~some).any()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "alps", "random-weight"])
def test_a_pattern_that_keeps_all_is_the_identity(method: str, llama: Subject) -> None:
    plan = plan_of(llama, method, Target(pattern=Pattern(8, 8)))
    assert all(mask.all() for mask in plan.masks.values())
    for name, weight in plan.weights.items():
        assert torch.equal(weight, llama.checkpoint.tensor(name))


@pytest.mark.parametrize("method", WIDTH)
def test_kv_groups_stay_or_go_whole(method: str, tmp_path: Path) -> None:
    subject = Subject.make(tmp_path, "llama", layers=2)
    plan = plan_of(subject, method, Target(sizes={"heads": 4}))
    assert (plan.after.heads, plan.after.kv_heads) == (4, 2)
    (tmp_path / "out").mkdir()
    write_pruned(subject.checkpoint, plan, tmp_path / "out")
    whole, cut = subject.dense, hf(tmp_path / "out")
    for layer, kept in plan.keep_kv.items():
        before, after = whole.model.layers[layer].self_attn, cut.model.layers[layer].self_attn
        for new, old in enumerate(kept.tolist()):
            assert torch.equal(after.k_proj.weight[new * 8 : new * 8 + 8], before.k_proj.weight[old * 8 : old * 8 + 8])
            assert torch.equal(after.v_proj.weight[new * 8 : new * 8 + 8], before.v_proj.weight[old * 8 : old * 8 + 8])
            assert torch.equal(
                after.q_proj.weight[new * 16 : new * 16 + 16], before.q_proj.weight[old * 16 : old * 16 + 16]
            )
            assert torch.equal(
                after.o_proj.weight[:, new * 16 : new * 16 + 16], before.o_proj.weight[:, old * 16 : old * 16 + 16]
            )


# Nothing is lost with what is nothing.


def planted(subject: Subject, plant: Callable[[nn.Module, int], None]) -> Subject:
    model = subject.model()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            plant(block, layer)
    model.save_pretrained(subject.directory)
    return dataclasses.replace(subject)


def same_logits(subject: Subject, plan: Plan, out: Path) -> None:
    out.mkdir()
    write_pruned(Checkpoint(subject.directory), plan, out)
    wanted = logits(hf(subject.directory), subject.ids)
    found = logits(hf(out), subject.ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert plan.after.total < plan.before.total


@pytest.mark.parametrize("name", ["llama-biased", "gemma3", "phi3"])  # test_family_proofs.py has every family
def test_units_that_do_nothing_go_and_nothing_changes(name: str, tmp_path: Path) -> None:
    subject = Subject.make(tmp_path, name, layers=3)
    dead = DeadUnits(subject.checkpoint.shape)
    dead.plant(subject.model()).save_pretrained(subject.directory)
    subject = dataclasses.replace(subject)
    for method in ("wanda-sp", "minitron-width", "llm-pruner"):
        plan = plan_of(subject, method, Target(sizes={"ffn": dead.ffn_left, "kv_heads": dead.kv_left}))
        for layer in range(3):
            for space, keep, units in (("ffn", plan.keep_ffn, dead.ffn), ("kv", plan.keep_kv, dead.kv)):
                scores = plan.scores[f"{space}.{layer}"]
                assert set(range(len(scores))) - set(keep[layer].tolist()) == set(units[layer])
                assert (scores == 0).nonzero().flatten().tolist() == units[layer]
        same_logits(subject, plan, tmp_path / f"out-{method}")


@pytest.mark.parametrize("name", ["llama-biased", "qwen3-biased", "gemma3-untied"])
def test_channels_that_are_constant_become_a_bias(name: str, tmp_path: Path) -> None:
    subject = Subject.make(tmp_path, name, layers=3)
    both = name == "llama-biased"

    def plant(block: nn.Module, layer: int) -> None:
        d, gone = subject.head_dim, [(7 * i + 3 * layer) % 64 for i in range(16)]
        block.get_parameter("self_attn.v_proj.weight")[layer * d : (layer + 1) * d] = 0  # its bias stays
        for linear in ("gate_proj", "up_proj") if both else ():
            block.get_parameter(f"mlp.{linear}.weight")[gone] = 0

    subject = planted(subject, plant)
    plan = plan_of(subject, "flap", Target(sizes={"ffn": 48, "kv_heads": 2} if both else {"kv_heads": 2}))
    for layer in range(3):
        assert set(range(3)) - set(plan.keep_kv[layer].tolist()) == {layer}
    assert len(plan.biases) == (6 if both else 3) and all(bias.abs().max() > 0.01 for bias in plan.biases.values())
    same_logits(subject, plan, tmp_path / "out")


@quickly
@given(st.integers(0, 99), st.integers(2, 5), st.integers(1, 40), ratios)
def test_sparsegpt_s_counts(seed: int, rows: int, spans: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, spans * 4, generator=generator) for n in (30, rows))
    stats: dict[type, Tensor] = {Gram: x.T @ x / 30}
    found, keep = pruned(SparseGPT(block=24), weight, stats, Selector(ratio, "linear"))
    for mask in keep.split(24, dim=1):
        assert int((~mask).sum()) == math.floor(Fraction(str(ratio)) * mask.numel())
    assert not found[~keep].any() and torch.isfinite(found).all()
    found, keep = pruned(SparseGPT(block=24), weight, stats, Selector(0.5, "linear", 4))
    assert (keep.reshape(-1, 4).sum(dim=1) == 2).all() and not found[~keep].any()


def test_calibration_is_told_from_its_absence(llama: Subject) -> None:
    assert isinstance(calibration(llama.ids), Calibration)
    for method in METHODS:
        assert get_method(method).calibrated == (method not in (*RANDOM, "magnitude"))
