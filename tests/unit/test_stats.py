"""Statistics against loops and numpy, in batches of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.calibration.statistics import (
    Gram,
    Mean,
    MeanCosine,
    MeanGradient,
    MeanSquare,
    MeanSquareGradient,
    StateStatistic,
    Statistic,
    Variance,
    WindowMagnitude,
)

ACTIVATIONS = (Mean, MeanSquare, Variance, Gram, WindowMagnitude)


def of(kind: type[Statistic], x: Tensor, batch: int, width: int = 1) -> Tensor:
    statistic = kind(width)
    for part in x.split(batch):
        statistic.update(part)
    return statistic.value()


def by_loops(kind: type[Statistic], x: Tensor, width: int) -> list[list[float]]:
    windows, positions, channels = x.shape
    tokens = [x[b, t].tolist() for b in range(windows) for t in range(positions)]
    mean = [sum(token[c] for token in tokens) / len(tokens) for c in range(channels)]
    if kind is Mean:
        return [mean]
    if kind is MeanSquare:
        return [[sum(token[c] ** 2 for token in tokens) / len(tokens) for c in range(channels)]]
    if kind is Variance:
        return [[sum((token[c] - mean[c]) ** 2 for token in tokens) / (len(tokens) - 1) for c in range(channels)]]
    if kind is Gram:
        rows = range(channels)
        return [[sum(token[i] * token[j] for token in tokens) / len(tokens) for j in rows] for i in rows]
    return [[by_window(x, batch, sequence, width) for sequence in ("mean", "l2")] for batch in ("mean", "l2")]  # type: ignore[misc]


def by_window(x: Tensor, batch: str, sequence: str, width: int) -> list[float]:
    """For each unit, an aggregate over windows of one over positions of the unit's norm."""
    aggregates = {"mean": lambda v: sum(v) / len(v), "l2": lambda v: math.sqrt(sum(a * a for a in v))}
    units = []
    for first in range(0, x.shape[2], width):
        norms = [[math.hypot(*token[first : first + width].tolist()) for token in window] for window in x]
        units.append(aggregates[batch]([aggregates[sequence](window) for window in norms]))
    return units


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5), st.integers(2, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99)
)
def test_activations_against_loops(windows: int, positions: int, units: int, batch: int, width: int, seed: int) -> None:
    x = torch.randn(windows, positions, units * width, generator=torch.Generator().manual_seed(seed))
    for kind in ACTIVATIONS:
        found = of(kind, x, batch, width)
        wanted = torch.tensor(by_loops(kind, x.double(), width), dtype=torch.float64)
        torch.testing.assert_close(found.double(), wanted.reshape(found.shape), rtol=1e-5, atol=1e-6)
        assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_half_precision_is_summed_in_more(kind: type[Statistic]) -> None:
    x = torch.randn(40, 50, 4).to(torch.bfloat16)
    torch.testing.assert_close(of(kind, x, 3, 2), of(kind, x.float(), 40, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 8, 9, 21])
def test_gram_in_tiles_and_pieces(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gram, "tile", 8)
    monkeypatch.setattr(Gram, "tokens", 5)
    x = torch.randn(7, 6, channels).to(dtype)
    wanted = (x.double().flatten(0, 1).T @ x.double().flatten(0, 1)) / 42
    for batch in (1, 2, 7):
        found = of(Gram, x, batch)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(found, found.T)


def test_a_gram_has_one_matrix() -> None:
    statistic, x = Gram(), torch.randn(4, 100, 700)  # two rows of tiles
    statistic.update(x[:2])
    first = statistic.value()
    before = first.clone()
    assert torch.equal(statistic.value(), before)  # asked again
    statistic.update(x[2:])
    assert statistic.value() is first
    torch.testing.assert_close(first, x.flatten(0, 1).T @ x.flatten(0, 1) / 400, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wide_batches_are_taken_in_pieces_and_left_alone(kind: type[Statistic], dtype: torch.dtype) -> None:
    x = (3 + torch.randn(3, 90, 1024)).to(dtype)  # more than 2^18 values: the second piece begins within a window
    kept = x.clone()
    found = of(kind, x, 3)
    assert torch.equal(x, kept) and found.dtype == torch.float32
    tokens = x.double().flatten(0, 1)
    wanted = {
        Mean: tokens.mean(dim=0),
        MeanSquare: tokens.square().mean(dim=0),
        Variance: tokens.var(dim=0),
        Gram: tokens.T @ tokens / len(tokens),
        WindowMagnitude: torch.stack(
            [
                torch.stack([x.double().abs().mean((0, 1)), x.double().square().sum(1).sqrt().mean(0)]),
                torch.stack([x.double().abs().mean(1).square().sum(0).sqrt(), x.double().square().sum((0, 1)).sqrt()]),
            ]
        ),
    }[kind]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_variance_does_not_cancel(offset: float, batch: int) -> None:
    x = (offset + torch.randn(50, 20, 6)).float()  # what float32 holds, exactly as it holds it
    wanted = np.var(x.numpy().astype(np.longdouble).reshape(-1, 6), axis=0, ddof=1).astype(np.float64)
    torch.testing.assert_close(of(Variance, x, batch).double(), torch.from_numpy(wanted), rtol=1e-6, atol=0)
    torch.testing.assert_close(of(Mean, x, batch).double(), x.double().mean((0, 1)), rtol=1e-6, atol=1e-7)


def test_what_is_constant_does_not_vary() -> None:
    for constant in (0.0, 0.1, -3e5):
        assert of(Variance, torch.full((4, 5, 3), constant), 2).tolist() == [0.0] * 3
    assert of(Variance, torch.randn(1, 1, 3), 1).tolist() == [0.0] * 3  # one token


def test_cosines_of_states() -> None:
    statistic, cosines = MeanCosine(), []
    for seed in range(3):
        before, step = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)), torch.randn(2, 4, 8)
        after = before + 1e-3 * step  # nearly parallel: 1 - cosine is about 1e-6
        statistic.update(before, after)
        for h, g in zip(before.double().flatten(0, 1), after.double().flatten(0, 1), strict=True):
            cosines.append(float(h @ g) / math.sqrt(float(h @ h) * float(g @ g)))
    assert 1 - float(statistic.value()) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-6)
    assert 1 - float(statistic.value()) < 1e-5
    assert isinstance(statistic, StateStatistic)


def test_gradients_of_windows() -> None:
    gradients = [torch.randn(3, 2) for _ in range(4)]
    kept = [g.clone() for g in gradients]
    mean, square = MeanGradient(), MeanSquareGradient()
    for gradient in gradients:
        mean.update(gradient)
        square.update(gradient)
    torch.testing.assert_close(mean.value(), torch.stack(kept).mean(0))
    torch.testing.assert_close(square.value(), torch.stack(kept).square().mean(0))
    assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True))  # theirs, and not ours to change
