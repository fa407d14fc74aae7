"""Width methods against loops over plain models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from formulas import NAMES, Piece, Subject, agrees, capture, fits, groups_lost, hidden_pieces, pieces
from helpers import calibration
from secateur.calibration.place import Place
from secateur.calibration.statistics import Mean, Variance, WindowMagnitude
from secateur.errors import UserError
from secateur.methods.base import WidthMethod
from secateur.methods.flap import FLAP
from secateur.methods.minitron_width import MinitronWidth
from secateur.methods.registry import get_method
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target

ALL = {"hidden": 40, "ffn": 44, "kv_heads": 2}
LAYERED = {"ffn": 44, "kv_heads": 2}


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), request.param, layers=3)


def plan_of(subject: Subject, method: str, sizes: dict[str, int] = LAYERED, **options: Any) -> Plan:
    target = Target(sizes=sizes)
    return make_plan(subject.checkpoint, method, target, calibration(subject.ids), options=options, batch=2)


def fits_units(plan: Plan, name: str, scores: list[float]) -> None:
    space, _, layer = name.partition(".")
    kept = {
        "hidden": lambda: plan.keep_hidden,
        "ffn": lambda: plan.keep_ffn[int(layer)],
        "kv": lambda: plan.keep_kv[int(layer)],
    }
    indices = kept[space]()
    assert indices.tolist() == sorted(set(indices.tolist())) and len(indices) == plan.after.units(space)
    fits(indices.tolist(), scores)


def reader(subject: Subject, layer: int, space: str) -> str:
    return f"model.layers.{layer}." + {"ffn": "mlp.down_proj", "kv": "self_attn.o_proj"}[space]


def aggregated(x: Tensor, batch: str, sequence: str) -> list[float]:
    """For each channel, an aggregate over windows of one over positions; of two L2 norms the square, as is scored."""
    aggregates = {"mean": lambda v: sum(v) / len(v), "l2": lambda v: math.sqrt(sum(a * a for a in v))}
    found = []
    for c in range(x.shape[-1]):
        windows = [aggregates[sequence]([abs(v) for v in window.tolist()]) for window in x[:, :, c]]
        found.append(aggregates[batch](windows))
    return [score**2 for score in found] if batch == sequence == "l2" else found


def norms_of(subject: Subject) -> list[str]:
    """The norms before attention and FFN, of all layers; behind them in OLMo 2."""
    names = {
        "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }.get(subject.name.partition("-")[0], ("input_layernorm", "post_attention_layernorm"))
    return [f"model.layers.{layer}.{name}" for layer in range(subject.layers) for name in names]


@pytest.mark.parametrize("how", ["l2 mean", "l2 l2", "mean l2", "mean mean"])
def test_minitron_width_against_the_formula(subject: Subject, how: str) -> None:
    options = dict(zip(("batch", "sequence"), how.split(), strict=True))
    plan, hidden = plan_of(subject, "minitron-width", ALL, **options), [0.0] * subject.hidden
    for norm in norms_of(subject):
        scores = aggregated(subject.seen[norm][1], **options)
        hidden = [a + b for a, b in zip(hidden, scores, strict=True)]
    for layer in range(subject.layers):
        ffn = aggregated(subject.seen[reader(subject, layer, "ffn")][0], **options)
        heads = subject.seen[reader(subject, layer, "kv")][0].unflatten(-1, (-1, subject.head_dim))
        lengths = torch.tensor([[[math.hypot(*h.tolist()) for h in token] for token in window] for window in heads])
        queries = aggregated(lengths.double(), **options)
        kv = [sum(queries[g * subject.group : (g + 1) * subject.group]) for g in range(subject.kv_heads)]
        for name, scores in ((f"ffn.{layer}", ffn), (f"kv.{layer}", kv)):
            agrees(plan.scores[name], scores)
            fits_units(plan, name, scores)
    agrees(plan.scores["hidden"], hidden)
    fits_units(plan, "hidden", hidden)
    share = sum(hidden[c] for c in plan.keep_hidden.tolist()) / sum(hidden)
    assert plan.summary["importance_kept"]["hidden"] == pytest.approx(share, rel=1e-5)
    assert set(plan.scores) == {"hidden"} | {f"{s}.{n}" for s in ("ffn", "kv") for n in range(subject.layers)}
    if how == "l2 mean":
        default = plan_of(subject, "minitron-width", ALL)
        assert all(torch.equal(default.scores[name], scores) for name, scores in plan.scores.items())


def test_minitron_width_of_the_studys_authors(subject: Subject) -> None:
    """Their mean is over batches of one window; squares are summed over positions, windows and norms."""
    plan = plan_of(subject, "minitron-width", ALL, batch="l2", sequence="l2")

    def importance(windows: Tensor) -> Tensor:
        return torch.stack([w[None].abs().mean(dim=0).square().sum(dim=0) for w in windows.double()]).sum(dim=0)

    hidden = torch.stack([importance(subject.seen[norm][1]) for norm in norms_of(subject)]).sum(dim=0)
    assert plan.keep_hidden is not None
    assert set(plan.keep_hidden.tolist()) == set(hidden.topk(ALL["hidden"]).indices.tolist())
    for layer in range(subject.layers):
        ffn = importance(subject.seen[reader(subject, layer, "ffn")][0])
        assert set(plan.keep_ffn[layer].tolist()) == set(ffn.topk(ALL["ffn"]).indices.tolist())


def test_wanda_sp_prunes_block_after_block(subject: Subject) -> None:
    plan, model = plan_of(subject, "wanda-sp"), subject.model()
    misled = 0
    for layer in range(subject.layers):
        seen = capture(model, subject.ids)
        for space in ("ffn", "kv"):
            name = reader(subject, layer, space)
            scores = _wanda_sp(subject, model.get_parameter(f"{name}.weight"), seen[name][0], space)
            agrees(plan.scores[f"{space}.{layer}"] * subject.ids.numel() ** 0.5, scores)
            fits_units(plan, f"{space}.{layer}", scores)
            dense = _wanda_sp(subject, model.get_parameter(f"{name}.weight"), subject.seen[name][0], space)
            misled += dense != pytest.approx(scores, rel=1e-3)
        kept = set(plan.keep_ffn[layer].tolist())
        with torch.no_grad():  # both are scored before either is pruned
            gone = [c for c in range(subject.ffn) if c not in kept]
            model.get_parameter(f"{reader(subject, layer, 'ffn')}.weight")[:, gone] = 0
            model.get_parameter(f"{reader(subject, layer, 'kv')}.weight")[
                :, groups_lost(subject, plan.keep_kv[layer])
            ] = 0
    assert misled >= subject.layers  # what later blocks see does depend on the pruned ones before


def _wanda_sp(subject: Subject, weight: Tensor, x: Tensor, space: str) -> list[float]:
    scores = []
    for column, values in zip(weight.detach().double().T, x.flatten(0, 1).T, strict=True):
        norm = math.sqrt(sum(v * v for v in values.tolist()))
        scores.append(sum(abs(w) * norm for w in column.tolist()))
    width = subject.group * subject.head_dim
    return scores if space == "ffn" else [sum(scores[i : i + width]) for i in range(0, len(scores), width)]


def test_flap_against_the_formula(subject: Subject) -> None:
    plan, biases = plan_of(subject, "flap"), {}
    for layer in range(subject.layers):
        for space in ("ffn", "kv"):
            name = reader(subject, layer, space)
            weight, x = subject.dense.get_parameter(f"{name}.weight").detach().double(), subject.seen[name][0]
            scores, means = [], []
            for column, values in zip(weight.T.tolist(), x.flatten(0, 1).T.tolist(), strict=True):
                means.append(sum(values) / len(values))
                variance = sum((v - means[-1]) ** 2 for v in values) / (len(values) - 1)
                scores.append(variance * sum(w**2 for w in column))
            mean = sum(scores) / len(scores)
            spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
            scores = [(s - mean) / spread for s in scores]
            width = subject.group * subject.head_dim if space == "kv" else 1
            scores = [sum(scores[i : i + width]) / width for i in range(0, len(scores), width)]
            agrees(plan.scores[f"{space}.{layer}"], scores, spread=1.0)
            fits_units(plan, f"{space}.{layer}", scores)
            kept = set(plan.keep_ffn[layer].tolist())
            lost = [c for c in range(subject.ffn) if c not in kept]
            gone = lost if space == "ffn" else groups_lost(subject, plan.keep_kv[layer])
            biases[f"{name}.bias"] = sum(weight[:, c] * means[c] for c in gone)
    offered = _biases_offered(subject)
    assert set(plan.biases) == {name for name in biases if any(part in name for part in offered)}
    for name, bias in plan.biases.items():
        agrees(bias, biases[name], spread=float(biases[name].abs().max()))
    modules = {"o_proj": "self_attn.o_proj", "down_proj": "mlp.down_proj"}
    assert plan.summary["bias"]["compensated"] == sorted(f"{modules[part]}.bias" for part in offered)
    assert sorted(plan.summary["bias"]["not"]) == sorted(m for part, m in modules.items() if part not in offered)


def _biases_offered(subject: Subject) -> tuple[str, ...]:
    """The projections of residual branches that can have a bias, as transformers' own classes build them."""
    family = subject.name.partition("-")[0]
    return {"llama": ("o_proj", "down_proj"), "qwen3": ("o_proj",), "gemma3": ("o_proj",), "olmo2": ("o_proj",)}.get(
        family, ()
    )


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_flap_s_bias_can_be_required_or_declined(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    subject = Subject.make(tmp_path_factory.mktemp("model"), name)
    declined = plan_of(subject, "flap", bias="none")
    assert not declined.biases and "bias" not in declined.summary and declined.after.switches == ()
    if name == "llama":
        assert plan_of(subject, "flap", bias="require").after.switches == ("attention_bias", "mlp_bias")
    else:
        with pytest.raises(UserError, match=r"bias=require: mistral has no option .* mlp\.down_proj"):
            plan_of(subject, "flap", bias="require")


ORDERS, AGGREGATES = ("first", "second", "mixed"), ("element", "vector")


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_llm_pruner_against_the_formula(subject: Subject, aggregate: str) -> None:
    for order in ORDERS if subject.name in ("llama-tied", "phi3", "olmo2") else ("mixed",):
        _check_llm_pruner(subject, order, aggregate)


def _check_llm_pruner(subject: Subject, order: str, aggregate: str) -> None:
    plan = plan_of(subject, "llm-pruner", ALL, order=order, aggregate=aggregate)
    saliences, magnitudes = _saliences(subject, order), 0.0

    def score(parts: list[Piece], space: str = "") -> float:
        nonlocal magnitudes
        values = [(name, saliences[name][where]) for name, where in parts]
        magnitudes = max(magnitudes, *(float(v.abs().sum()) for _, v in values))
        if aggregate == "element":
            return sum(float(v.abs().sum()) for _, v in values)
        return sum(abs(float(c.sum())) for name, v in values for c in channels(name, v, space))

    def channels(name: str, values: Tensor, space: str) -> list[Tensor]:
        """A unit's values in one weight, channel by channel; of these a KV head has several."""
        count = 1 if space != "kv" else len(values) if "norm" in name else len(values) // subject.hidden
        return list(values.reshape(-1, count).T if "o_proj" in name else values.reshape(count, -1))

    for layer in range(subject.layers):
        for space, units in (("ffn", subject.ffn), ("kv", subject.kv_heads)):
            scores = [score(list(pieces(subject, layer, space, u)), space) for u in range(units)]
            agrees(plan.scores[f"{space}.{layer}"], scores, spread=magnitudes if aggregate == "vector" else 0)
            fits_units(plan, f"{space}.{layer}", scores)
    hidden = [score(list(hidden_pieces(subject, c))) for c in range(subject.hidden)]
    agrees(plan.scores["hidden"], hidden, spread=magnitudes if aggregate == "vector" else 0)
    fits_units(plan, "hidden", hidden)


def _saliences(subject: Subject, order: str) -> dict[str, Tensor]:
    """Name of a parameter -> its values' saliences, flat."""
    gradient, square = subject.gradients
    found = {}
    for name, parameter in subject.dense.named_parameters():
        weight = parameter.detach().double()
        first, second = gradient[name] * weight, weight * square[name] * weight
        found[name] = {"first": first, "second": second, "mixed": first - 0.5 * second}[order].flatten()
    return found


def test_width_score_by_hand() -> None:
    shape = Shape(hidden=2, ffn=2, layers=1, heads=2, kv_heads=1, head_dim=1, vocabulary=3)
    # Two windows of three positions, |x| of (1, 2, 3) and (2, 2, 2) in one channel: means 2, 2; roots of 14 and 12.
    seen = {WindowMagnitude: torch.tensor([[[2.0, 1.0], [3.6, 1.0]], [[8**0.5, 1.0], [26**0.5, 1.0]]])}
    place = Place("ffn", 2, shape, layer=0, stats=seen)
    assert MinitronWidth().score(place).tolist() == pytest.approx([8**0.5, 1])
    assert MinitronWidth(batch="l2", sequence="l2").score(place).tolist() == pytest.approx([26, 1])
    assert MinitronWidth(batch="mean", sequence="l2").score(place).tolist() == pytest.approx([3.6, 1])
    assert MinitronWidth(batch="mean", sequence="mean").score(place).tolist() == [2, 1]
    assert MinitronWidth(batch="mean", sequence="mean").score(Place("kv", 1, shape, 0, seen)).tolist() == [3]


@pytest.mark.parametrize("units", [1, 4])
def test_flap_where_nothing_fluctuates(units: int) -> None:
    shape = Shape(hidden=2, ffn=units, layers=1, heads=1, kv_heads=1, head_dim=2, vocabulary=3)
    for variance in (torch.zeros(units), torch.full((units,), 0.3)):
        stats = {Variance: variance, Mean: torch.ones(units)}
        place = Place("ffn", units, shape, layer=0, stats=stats, reader=torch.ones(2, units))
        assert FLAP().score(place).tolist() == [0.0] * units


def test_axes_that_a_method_does_not_score(tmp_path_factory: pytest.TempPathFactory) -> None:
    subject = Subject.make(tmp_path_factory.mktemp("model"), "llama")
    for method in ("wanda-sp", "flap"):
        with pytest.raises(UserError, match="hidden"):
            plan_of(subject, method, {"hidden": 40})
    widths = [get_method(n) for n in ("wanda-sp", "flap", "llm-pruner", "minitron-width", "random-width")]
    assert all(isinstance(method, WidthMethod) and set(method.axes) <= set(method.scores) for method in widths)
