"""One pruned model: the share of each layer that remains, and the losses of its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from secateur.comparison.ablation import ControlGap
from secateur.comparison.records import PrunedModel
from secateur.formatting import NOT_MEASURED, loss, percent
from secateur.report.figures.palette import Palette

__all__ = ["draw_controls", "draw_layers"]

_WIDTH = 4.0  # inches


def draw_layers(pruned: PrunedModel, parent: dict[str, Any], title: str, palette: Palette) -> tuple[Figure, str]:
    """A strip of the parent's layers, each filled by the share that remains, and a description."""
    strips = _strips(pruned, parent)
    height = 0.55 + 0.5 * len(strips)
    figure = Figure(figsize=(_WIDTH, height))
    figure.text(0.02, 1 - 0.06 / height, title, va="top", weight="bold", color=palette.ink, size=10.5)
    texts = []
    for row, (label, shares) in enumerate(strips.items()):
        bottom = (height - 0.55 - 0.5 * row - 0.28) / height
        axes = figure.add_axes((0.02, bottom, 0.96, 0.3 / height))
        _draw_strip(axes, shares, palette)
        axes.annotate(
            label,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            size=8.5,
            color=palette.muted,
        )
        removed = [str(layer + 1) for layer, value in enumerate(shares) if value is None]
        span = _range_text(label, [value for value in shares if value is not None], len(shares))
        texts.append(f"{label}: {span}" + (f", layers {', '.join(removed)} removed" if removed else ""))
        figure.text(0.98, bottom + 0.4 / height, span, ha="right", va="center", size=8.5, color=palette.ink)
    figure.text(0.02, 0.06 / height, f"layers 1 to {len(pruned.layers)}, left to right", size=8.5, color=palette.muted)
    return figure, "; ".join(texts) + "."


def _range_text(label: str, shares: Sequence[float], layers: int) -> str:
    """The range of the remaining shares as text."""
    if label == "layers" or not shares:
        return f"{len(shares)} of {layers} kept"
    low, high = percent(min(shares)), percent(max(shares))
    return f"{low} kept" if low == high else f"{low} to {high} kept"


def _strips(pruned: PrunedModel, parent: dict[str, Any]) -> dict[str, list[float | None]]:
    """For each kind of unit, the share that remains in each layer, None for a removed layer; at least whole layers."""

    def shares(key: str, whole: float | None) -> list[float | None]:
        return [layer[key] / whole if layer.get("kept", True) else None for layer in pruned.layers] if whole else []

    layers = [layer for layer in pruned.layers if layer.get("kept", True)]
    strips: dict[str, list[float | None]] = {}
    for label, key, whole in (("FFN channels", "ffn", parent.get("ffn")), ("KV groups", "kv", parent.get("kv_heads"))):
        if all(layer.get(key) is not None for layer in layers):
            values = shares(key, whole)
            if any(value not in (None, 1.0) for value in values):
                strips[label] = values
    if layers and all(layer.get("sparsity") is not None for layer in layers):
        strips["weights"] = [1 - layer["sparsity"] if layer.get("kept", True) else None for layer in pruned.layers]
    return strips or {"layers": [1.0 if layer.get("kept", True) else None for layer in pruned.layers]}


def _draw_strip(axes: Axes, shares: Sequence[float | None], palette: Palette) -> None:
    axes.set_xlim(0, len(shares))
    axes.set_ylim(0, 1.02)
    axes.set_axis_off()
    for layer, value in enumerate(shares):
        box: dict[str, Any] = {"width": 0.84, "lw": 0.8, "clip_on": False}
        edge = {"ls": (0, (1.5, 1.5))} if value is None else {}
        axes.add_patch(Rectangle((layer + 0.08, 0), height=1, fill=False, ec=palette.muted, **edge, **box))
        if value is not None:
            axes.add_patch(Rectangle((layer + 0.08, 0), height=value, fc=palette.pruned, ec="none", **{**box, "lw": 0}))


def draw_controls(controls: Sequence[ControlGap], title: str, palette: Palette) -> tuple[Figure, str]:
    """The losses of the pruned run and its controls, ordered by how much they inherit, and a description."""
    rows, top, foot = len(controls), 0.5, 0.5
    height = top + 0.42 * rows + foot
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.04, foot / height, 0.92, 0.42 * rows / height))
    size = 10.5 if len(title) <= 44 else 10.5 * 44 / len(title)
    figure.text(0.02, 1 - 0.06 / height, title, va="top", weight="bold", color=palette.ink, size=size)
    losses = [control.loss for control in controls if control.loss is not None]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    room = 0.06 * max(high - low, 0.02)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(rows, 0)
    for row, control in enumerate(controls):
        words: dict[str, Any] = {"va": "center", "size": 9}
        x_min, x_max = axes.get_xlim()
        axes.text(x_min, row + 0.28, control.label, color=palette.ink, ha="left", **words)
        value = loss(control.loss) if control.loss is not None else NOT_MEASURED
        axes.text(x_max, row + 0.28, value, color=palette.ink, ha="right", **words)
        axes.plot([x_min, x_max], [row + 0.72] * 2, color=palette.rule, lw=0.7, zorder=1)
        if control.loss is not None:
            inherits = control.init == "pruned"
            colour = palette.pruned if inherits else palette.scratch
            axes.plot([control.loss], [row + 0.72], marker="o" if inherits else "s", ms=6, color=colour, clip_on=False)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(
        "held-out loss, nats per token, at equal training tokens", size=8.5, color=palette.muted, labelpad=2
    )
    axes.patch.set_visible(False)
    axes.tick_params(color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(palette.rule)
    return figure, "; ".join(f"{c.label}: {loss(c.loss)}" for c in controls) + ". Losses in nats per token."
